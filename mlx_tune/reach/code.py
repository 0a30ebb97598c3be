"""The objects that code can reach by name: globals, and what it reads and assigns of modules."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from types import CodeType, FunctionType, ModuleType
from typing import Any

from mlx_tune.reach.facts import Facts

#: Code of these packages holds no array that belongs to a model, and can be very large: libraries of arrays and data,
#: of types, of progress and logs, and what runs notebooks and tests.
_FOREIGN = frozenset(sys.stdlib_module_names) | {
    *("mlx", "mlx_tune", "numpy", "scipy", "pandas", "sklearn", "torch", "jax", "tensorflow", "numba", "sympy"),
    *("transformers", "tokenizers", "datasets", "sentencepiece", "huggingface_hub", "safetensors", "PIL", "cv2"),
    *("einops", "beartype", "jaxtyping", "typeguard", "pydantic", "pydantic_core", "attr", "typing_extensions"),
    *("rich", "tqdm", "psutil", "wandb", "mlflow", "tensorboardX", "swanlab", "matplotlib", "loguru", "click"),
    *("IPython", "ipykernel", "pytest", "_pytest", "hypothesis"),
}


@cache
def is_foreign(module: str | None) -> bool:
    """True where code of this module is not looked into."""
    return (module or "").partition(".")[0] in _FOREIGN


class Names:
    """The names that code and the functions defined in it look up outside of themselves.

    Attributes:
        loaded: For each global that it reads, the attributes that it asks of it, as written: `{"ops": ("math.sine",)}`
            for `ops.math.sine(x)`. Where the global is a module, these are what it uses.
        stored: The globals that it assigns.
        assigned: The attributes that it assigns, of whatever object.
        placed: For each name, global or not, the attributes that it assigns of it: `{"ops": ("last",)}` for
            `ops.last = x`.
        inner: As `loaded`, for names that are not global: a function may close over a module.
        imported: The modules that it imports itself, and what it asks of them.
    """

    __slots__ = ("assigned", "imported", "inner", "loaded", "placed", "stored")

    def __init__(self) -> None:
        self.loaded: dict[str, tuple[str, ...]] = {}
        self.stored: tuple[str, ...] = ()
        self.assigned: frozenset[str] = frozenset()
        self.placed: dict[str, tuple[str, ...]] = {}
        self.inner: dict[str, tuple[str, ...]] = {}
        self.imported: dict[tuple[str, int], tuple[str, ...]] = {}


_names: Facts[Names] = Facts()


def global_names(code: CodeType) -> Names:
    """The names of code, found once."""
    return _names.get(id(code)) or _names.learn(code, _read(code))


def _read(code: CodeType) -> Names:
    names = Names()
    asked_of: dict[str, dict[str, Any]] = {"loaded": {}, "inner": {}, "placed": {}, "imported": {}}

    def ask(kind: str, name: Any, *paths: str) -> None:
        asked_of[kind].setdefault(name, {}).update(dict.fromkeys(paths))

    stored: dict[str, None] = {}
    assigned: set[str] = set()
    local: dict[str, tuple[tuple[str, int], str]] = {}  # names that stand for what was imported here
    constants: list[Any] = [0, None]
    module: tuple[str, int] | None = None
    of_it, kind, name, path = "", "", "", ""
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        if name and operation in ("LOAD_ATTR", "LOAD_METHOD"):
            path = f"{path}.{value}" if path else value
            continue
        if name and operation in ("STORE_ATTR", "DELETE_ATTR"):
            ask("placed", name, f"{path}.{value}" if path else value)
        elif name and path:
            ask(kind, name, path)
            if name in local:
                imported, below = local[name]
                ask("imported", imported, f"{below}.{path}" if below else path)
        kind, name, path = "", "", ""
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            kind, name = "loaded", value
            ask(kind, name)
        elif operation.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")):
            kind, name = "inner", value[-1] if isinstance(value, tuple) else value
        elif operation == "STORE_GLOBAL":
            stored[value] = None
        if operation in ("STORE_ATTR", "DELETE_ATTR"):
            assigned.add(value)
        elif operation in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constants = [constants[-1], value]
        elif operation == "IMPORT_NAME":
            level, wanted = constants
            # Without a list of names, `import a.b` gives `a`.
            module, of_it = (value if wanted or level else value.partition(".")[0], level or 0), ""
        elif operation == "IMPORT_FROM" and module is not None:
            of_it = f"{of_it}.{value}" if of_it and not constants[-1] else value
            ask("imported", module, of_it)
        elif operation in ("STORE_FAST", "STORE_DEREF", "STORE_GLOBAL", "STORE_NAME") and module is not None:
            local[value] = (module, of_it)
            module = module if constants[-1] else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inside = global_names(constant)
            stored.update(dict.fromkeys(inside.stored))
            assigned |= inside.assigned
            for part in asked_of:
                for key, paths in getattr(inside, part).items():
                    ask(part, key, *paths)
            for key, paths in inside.inner.items():
                if key in local:  # imported here, and used in a function that is defined here
                    imported, below = local[key]
                    ask("imported", imported, *(f"{below}.{p}" if below else p for p in paths))
    for part, found in asked_of.items():
        setattr(names, part, {key: tuple(paths) for key, paths in found.items()})
    names.stored, names.assigned = tuple(stored), frozenset(assigned)
    return names


def modules_inside(function: FunctionType) -> Iterator[tuple[str, ModuleType, tuple[str, ...], tuple[str, ...]]]:
    """The modules that a function closes over or imports: a name, the module, what it reads of it and what it assigns.

    Args:
        function: Any function.
    """
    names = global_names(function.__code__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name in names.inner or name in names.placed:
            try:
                value = cell.cell_contents
            except ValueError:
                continue  # not bound yet
            if isinstance(value, ModuleType):
                yield name, value, names.inner.get(name, ()), names.placed.get(name, ())
    for (name, level), asked in names.imported.items():
        package = function.__globals__.get("__package__") or ""
        imported = sys.modules.get(resolve_name("." * level + name, package) if level and package else name)
        if imported is not None:
            yield name, imported, asked, names.placed.get(name, ())


def names_in_module(
    label: str, module: ModuleType, asked: tuple[str, ...], placed: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any], dict[str, tuple[str, ...]], tuple[str, ...]]]:
    """The names of a module, and of modules in it, that code reads or assigns.

    Args:
        label: Its name in the code.
        module: The module.
        asked: The names that the code reads of it: `ops.math.sine` asks `ops` for `math.sine`.
        placed: The names that it assigns, in the same way.

    Yields:
        A module's name in the code, what it holds, what is read of it with what is read of that, and what is assigned.
    """
    loaded: dict[str, tuple[str, ...]] = {}
    below: dict[str, tuple[str, ...]] = {}
    stored: list[str] = []
    for path in asked:
        name, _, rest = path.partition(".")
        loaded[name] = (*loaded.get(name, ()), *([rest] if rest else []))
    for path in placed:
        name, _, rest = path.partition(".")
        if rest:
            below[name] = (*below.get(name, ()), rest)
        else:
            stored.append(name)
    held = vars(module)
    yield label, held, loaded, tuple(stored)
    for name in dict.fromkeys((*loaded, *below)):
        inner = held.get(name)
        if isinstance(inner, ModuleType) and (loaded.get(name) or below.get(name)):
            yield from names_in_module(f"{label}.{name}", inner, loaded.get(name, ()), below.get(name, ()))
