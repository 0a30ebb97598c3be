"""What code can reach by name: the globals that it loads, and the functions and values of classes."""

from __future__ import annotations

import dis
import sys
from functools import cache
from types import CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, TypeVar
from weakref import ref

import mlx.nn as nn

from mlx_tune.places import slot_names

T = TypeVar("T")

#: Code of these packages holds no array that belongs to a model, and can be very large: libraries of arrays and data,
#: of types, of progress and logs, and what runs notebooks and tests.
_FOREIGN = frozenset(sys.stdlib_module_names) | {
    *("mlx", "mlx_tune", "numpy", "scipy", "pandas", "sklearn", "torch", "jax", "tensorflow", "numba", "sympy"),
    *("transformers", "tokenizers", "datasets", "sentencepiece", "huggingface_hub", "safetensors", "PIL", "cv2"),
    *("einops", "beartype", "jaxtyping", "typeguard", "pydantic", "pydantic_core", "attr", "typing_extensions"),
    *("rich", "tqdm", "psutil", "wandb", "mlflow", "tensorboardX", "swanlab", "matplotlib", "loguru", "click"),
    *("IPython", "ipykernel", "pytest", "_pytest", "hypothesis"),
}

#: The attribute of the subclasses that `checkpoint` makes, which have nothing of their own to find.
GENERATED = "_checkpoint_plain"


@cache
def is_foreign(module: str | None) -> bool:
    """Whether code of this module is not looked into."""
    return (module or "").partition(".")[0] in _FOREIGN


class Facts(dict[int, T]):
    """What is known about objects, each under its `id`, and forgotten with it.

    A `WeakKeyDictionary` compares: code objects of the same text would be one, and each look-up would make a
    reference.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}

    def learn(self, thing: Any, fact: T) -> T:
        """Remember, and give it back. The fact must not refer to the thing, or it is never forgotten."""
        key = id(thing)
        self._alive[key] = ref(thing, lambda _: self._forget(key))
        self[key] = fact
        return fact

    def _forget(self, key: int) -> None:
        self.pop(key, None)
        self._alive.pop(key, None)


class Names:
    """What code and the functions defined in it look up outside of themselves.

    Attributes:
        loaded: For each global that it reads, the attributes that it asks of it, as written: `{"ops": ("math.sine",)}`
            for `ops.math.sine(x)`. Where the global is a module, these are what it uses.
        stored: The globals that it assigns.
        assigned: The attributes that it assigns, of whatever object.
    """

    __slots__ = ("assigned", "loaded", "stored")

    def __init__(self, loaded: dict[str, tuple[str, ...]], stored: tuple[str, ...], assigned: frozenset[str]) -> None:
        self.loaded = loaded
        self.stored = stored
        self.assigned = assigned


_names: Facts[Names] = Facts()


def global_names(code: CodeType) -> Names:
    """The globals of code, found once."""
    return _names.get(id(code)) or _names.learn(code, _read(code))


def _read(code: CodeType) -> Names:
    loaded: dict[str, dict[str, None]] = {}
    stored: dict[str, None] = {}
    assigned: set[str] = set()
    name, asked = "", ""
    for instruction in dis.get_instructions(code):
        if name and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            asked = f"{asked}.{instruction.argval}" if asked else instruction.argval
            continue
        if name and asked:
            loaded[name][asked] = None
        name, asked = "", ""
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            name = instruction.argval
            loaded.setdefault(name, {})
        elif instruction.opname == "STORE_GLOBAL":
            stored[instruction.argval] = None
        elif instruction.opname == "STORE_ATTR":
            assigned.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = global_names(constant)
            for inner_name, attributes in inner.loaded.items():
                loaded.setdefault(inner_name, {}).update(dict.fromkeys(attributes))
            stored.update(dict.fromkeys(inner.stored))
            assigned |= inner.assigned
    return Names({key: tuple(asked) for key, asked in loaded.items()}, tuple(stored), frozenset(assigned))


class Kind:
    """What does not change about a class.

    Attributes:
        own: Itself, its bases and the class that it is an instance of with its bases: those that are looked into.
        foreign: Whether it is a library's.
        slots: The attributes that it keeps in `__slots__`.
        is_module: Whether it is an `nn.Module`.
    """

    __slots__ = ("foreign", "is_module", "own", "slots")

    def __init__(self, kind: type) -> None:
        above: type = type(kind)
        # As references, since a fact must not hold what it is about.
        self.own = tuple(
            ref(base)
            for base in (*kind.__mro__, *above.__mro__)
            if not is_foreign(base.__module__) and GENERATED not in vars(base)
        )
        self.foreign = is_foreign(kind.__module__)
        self.slots = slot_names(kind)
        self.is_module = issubclass(kind, nn.Module)


_kinds: Facts[Kind] = Facts()


def facts_of(kind: type) -> Kind:
    """What does not change about a class, found once."""
    return _kinds.get(id(kind)) or _kinds.learn(kind, Kind(kind))


class Contents:
    """Where a class holds functions and values.

    Attributes:
        types: The types of everything in it, to notice that it was changed (mlx-lm replaces `__call__`).
        functions: The names of functions, class methods, static methods and properties.
        values: The names of arrays, containers and objects, and of numbers and flags that its code assigns.
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
    for name, value in held.items():
        if isinstance(value, FunctionType | staticmethod | classmethod | property):
            if name not in _SHOWING:
                functions.append(name)
            for function in functions_of(value):
                if name not in MAKING and isinstance(function, FunctionType):
                    assigned |= global_names(function.__code__).assigned
        elif isinstance(value, _PLAIN):
            plain.append(name)
        elif not isinstance(value, _NOTHING) and (hasattr(value, "__get__") or not name.startswith("__")):
            values.append(name)
    values += [name for name in plain if name in assigned]
    return _contents.learn(kind, Contents(types, tuple(functions), tuple(values)))


def functions_of(value: Any) -> tuple[Any, ...]:
    """The functions behind one entry of a class."""
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, property):
        return tuple(f for f in (value.fget, value.fset, value.fdel) if f is not None)
    return (value,)
