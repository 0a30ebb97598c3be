"""The facts of code and of classes that do not change, found once: the names that they use, and what to follow."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from types import CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, TypeVar
from weakref import ref

import mlx.nn as nn

from mlx_tune.substitution import is_substitute

T = TypeVar("T")


class Facts(dict[int, T]):
    """Facts of objects, each under its `id`, and forgotten with it.

    A `WeakKeyDictionary` compares: code objects of the same text would be one, and each look-up would make a
    reference.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, object] = {}

    def learn(self, thing: object, fact: T) -> T:
        """Remember, and give it back. The fact must not refer to the thing, or it is never forgotten."""
        key = id(thing)
        self._alive[key] = ref(thing, lambda _: self._forget(key))
        self[key] = fact
        return fact

    def _forget(self, key: int) -> None:
        self.pop(key, None)
        self._alive.pop(key, None)


#: Code of these packages holds no array that belongs to a model, and can be very large: libraries of arrays and data,
#: of types, of progress and logs, and what runs notebooks and tests.
_FOREIGN = frozenset(sys.stdlib_module_names) | {
    *("mlx", "mlx_tune", "numpy", "scipy", "pandas", "sklearn", "torch", "jax", "tensorflow", "numba", "sympy"),
    *("transformers", "tokenizers", "datasets", "sentencepiece", "huggingface_hub", "safetensors", "PIL", "cv2"),
    *("einops", "beartype", "jaxtyping", "typeguard", "pydantic", "pydantic_core", "attr", "typing_extensions"),
    *("rich", "tqdm", "psutil", "wandb", "mlflow", "tensorboardX", "swanlab", "matplotlib", "loguru", "click"),
    *("IPython", "ipykernel", "pytest", "_pytest", "hypothesis", "nanobind"),
}


@cache
def is_foreign(module: str | None) -> bool:
    """True where code of this module is not looked into."""
    return (module or "").partition(".")[0] in _FOREIGN


class CodeNames:
    """The names that code and the functions defined in it use.

    Attributes:
        loaded: The globals that it reads.
        stored: The globals that it assigns.
        read: The attributes that it reads, of whatever object, and the names that it imports from modules.
        assigned: The attributes that it assigns, of whatever object.
        placed: For each name of a global or of a variable closed over, the attributes that it assigns of it:
            `{"ops": ("last",)}` for `ops.last = x`.
        imported: The modules that it imports itself: name and level.
    """

    __slots__ = ("assigned", "imported", "loaded", "placed", "read", "stored")

    def __init__(self) -> None:
        self.loaded: dict[str, None] = {}
        self.stored: dict[str, None] = {}
        self.read: dict[str, None] = {}
        self.assigned: dict[str, None] = {}
        self.placed: dict[str, tuple[str, ...]] = {}
        self.imported: dict[tuple[str, int], None] = {}


_names: Facts[CodeNames] = Facts()


def names_in(code: CodeType) -> CodeNames:
    """The names of code, found once."""
    return _names.get(id(code)) or _names.learn(code, _read(code))


def _read(code: CodeType) -> CodeNames:
    names = CodeNames()
    constants: list[Any] = [0, None]
    holder = ""  # the name whose value is on top of the stack, as far as that is plain to see
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        if operation in ("STORE_ATTR", "DELETE_ATTR"):
            names.assigned[value] = None
            if holder:
                names.placed[holder] = (*names.placed.get(holder, ()), value)
        holder = ""
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.loaded[value] = None
            holder = value
        elif operation in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            holder = value
        elif operation in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            names.read[value] = None
        elif operation == "STORE_GLOBAL":
            names.stored[value] = None
        elif operation in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constants = [constants[-1], value]
        elif operation == "IMPORT_NAME":
            level, wanted = constants
            # Without a list of names, `import a.b` gives `a`.
            names.imported[value if wanted or level else value.partition(".")[0], level or 0] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inside = names_in(constant)
            for part in ("loaded", "stored", "read", "assigned", "imported"):
                getattr(names, part).update(getattr(inside, part))
            for name, placed in inside.placed.items():
                names.placed[name] = (*names.placed.get(name, ()), *placed)
    return names


def imported_by(function: FunctionType) -> Iterator[tuple[str, ModuleType]]:
    """The modules that a function imports itself and that are there already, with their names."""
    package = function.__globals__.get("__package__") or ""
    for name, level in names_in(function.__code__).imported:
        module = sys.modules.get(resolve_name("." * level + name, package) if level and package else name)
        if module is not None:
            yield name, module


#: Modules of the standard library whose objects are made to hold other people's.
OPEN = frozenset({"argparse", "collections", "functools", "types", "weakref"})


def slot_names(kind: type) -> tuple[str, ...]:
    """The attributes that a class keeps in `__slots__`, under the names they have outside the class."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"):
                continue
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(names)


class Kind:
    """The facts of a class that do not change.

    Attributes:
        own: Itself, its bases and the class that it is an instance of with its bases: those that are looked into.
        foreign: True where it is a library's.
        home: Its module, None where it is a library's.
        slots: The attributes that it keeps in `__slots__`.
        is_module: True where it is an `nn.Module`.
    """

    __slots__ = ("foreign", "home", "is_module", "own", "slots")

    def __init__(self, kind: type) -> None:
        above: type = type(kind)
        # As references, since a fact must not hold what it is about.
        self.own = tuple(
            ref(base)
            for base in (*kind.__mro__, *above.__mro__)
            if not is_foreign(base.__module__) and not is_substitute(base)
        )
        self.foreign = is_foreign(kind.__module__)
        self.home = None if self.foreign else kind.__module__
        self.slots = slot_names(kind)
        self.is_module = issubclass(kind, nn.Module)


_kinds: Facts[Kind] = Facts()


def facts_of(kind: type) -> Kind:
    """The facts of a class that do not change, found once."""
    return _kinds.get(id(kind)) or _kinds.learn(kind, Kind(kind))


class Contents:
    """Where a class holds functions and values.

    Attributes:
        types: The types of everything in it, to notice that it was changed (mlx-lm replaces `__call__`).
        functions: The names of functions, class methods, static methods and properties.
        values: The names of arrays, containers and objects, of numbers and flags that its code assigns, and of
            anything that its class methods assign.
    """

    __slots__ = ("functions", "types", "values")

    def __init__(self, types: list[int], functions: tuple[str, ...], values: tuple[str, ...]) -> None:
        self.types = types
        self.functions = functions
        self.values = values


_contents: Facts[Contents] = Facts()

#: What only shows an object. A data class writes one of them out, with closures of its own.
_SHOWING = frozenset({"__repr__", "__str__", "__rich_repr__"})

#: What only makes one.
MAKING = frozenset({"__new__", "__init__", "__post_init__"})

#: Entries of a class that hold nothing that could be an array, and those that may be counters and flags.
_NOTHING = (MemberDescriptorType, GetSetDescriptorType, ModuleType)
_PLAIN = (int, float, complex, str, bytes, type(None))


def contents_of(kind: type) -> Contents:
    """Where one class, apart from those it inherits from, holds functions and values."""
    held = vars(kind)
    types = [id(type(value)) for value in held.values()]
    known = _contents.get(id(kind))
    if known is not None and known.types == types:
        return known
    functions: list[str] = []
    values: list[str] = []
    plain: list[str] = []
    assigned: set[str] = set()
    made: dict[str, None] = {}
    for name, value in held.items():
        if isinstance(value, FunctionType | staticmethod | classmethod | property):
            if name not in _SHOWING:
                functions.append(name)
            for function in functions_of(value):
                if name not in MAKING and isinstance(function, FunctionType):
                    assigned.update(names_in(function.__code__).assigned)
                    if isinstance(value, classmethod):
                        made.update(names_in(function.__code__).assigned)
        elif isinstance(value, _PLAIN):
            plain.append(name)
        elif not isinstance(value, _NOTHING) and (hasattr(value, "__get__") or not name.startswith("__")):
            values.append(name)
    values += [name for name in plain if name in assigned] + [name for name in made if name not in held]
    return _contents.learn(kind, Contents(types, tuple(functions), tuple(values)))


def referent(weak: Any) -> tuple[Any, ...]:
    """The object that a weak reference or proxy stands for, if that is still there."""
    try:
        # A proxy hands every look-up on to what it stands for, bound methods included.
        return (weak() if isinstance(weak, ref) else weak.__repr__.__self__,)
    except ReferenceError:
        return ()


def functions_of(value: object) -> tuple[Any, ...]:
    """The functions behind one entry of a class."""
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, property):
        return tuple(f for f in (value.fget, value.fset, value.fdel) if f is not None)
    return (value,)
