"""The names by which code reaches objects: globals, attributes that it reads and assigns, and modules it imports."""

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
    *("IPython", "ipykernel", "pytest", "_pytest", "hypothesis", "nanobind"),
}


@cache
def is_foreign(module: str | None) -> bool:
    """True where code of this module is not looked into."""
    return (module or "").partition(".")[0] in _FOREIGN


class Names:
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


_names: Facts[Names] = Facts()


def names_in(code: CodeType) -> Names:
    """The names of code, found once."""
    return _names.get(id(code)) or _names.learn(code, _read(code))


def _read(code: CodeType) -> Names:
    names = Names()
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
