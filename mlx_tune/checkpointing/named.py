"""What code can reach by name: the globals of functions, and the functions and arrays of classes."""

from __future__ import annotations

import builtins
import dis
import sys
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

#: Code of these packages holds no array that belongs to a model, and their objects can be very large.
_FOREIGN = frozenset(sys.stdlib_module_names) | {
    *("mlx", "mlx_tune", "numpy", "scipy", "torch", "transformers", "tokenizers", "datasets", "PIL", "rich", "psutil")
}

_names: WeakKeyDictionary[CodeType, tuple[str, ...]] = WeakKeyDictionary()
_classes: WeakKeyDictionary[type, tuple[list[int], tuple[FunctionType, ...], tuple[str, ...]]] = WeakKeyDictionary()


@cache
def is_foreign(module: str | None) -> bool:
    """Whether code of this module is not looked into."""
    return (module or "").partition(".")[0] in _FOREIGN


def global_names(code: CodeType, scope: dict[str, Any]) -> tuple[str, ...]:
    """The names that code and the functions defined in it look up outside of themselves, modules and classes apart."""
    names = _names.get(code)
    if names is None:
        found = dict.fromkeys(
            instruction.argval
            for instruction in dis.get_instructions(code)
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        )
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                found.update(dict.fromkeys(global_names(constant, scope)))
        names = _names[code] = tuple(
            name
            for name in found
            if not isinstance(scope.get(name), ModuleType | type) and (name in scope or not hasattr(builtins, name))
        )
    return names


def class_functions(kind: type) -> list[FunctionType]:
    """The functions of a class and its bases that hold or name something."""
    return [f for base in kind.__mro__ if not is_foreign(base.__module__) for f in _scanned(base)[0]]


def class_arrays(kind: type) -> list[tuple[type, tuple[str, ...]]]:
    """For a class and its bases, the names under which each holds arrays, or containers that may."""
    return [(base, names) for base in kind.__mro__ if not is_foreign(base.__module__) and (names := _scanned(base)[1])]


def _scanned(kind: type) -> tuple[tuple[FunctionType, ...], tuple[str, ...]]:
    held = vars(kind)
    # A class can be changed at any time (mlx-lm replaces `__call__`), so what was found holds for the same values only.
    identities = list(map(id, held.values()))
    cached = _classes.get(kind)
    if cached is None or cached[0] != identities:
        functions: list[FunctionType] = []
        arrays: list[str] = []
        for name, value in held.items():
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if isinstance(value, FunctionType):
                if _holds_something(value):
                    functions.append(value)
            elif isinstance(value, mx.array | list | tuple | dict) and not name.startswith("__"):
                arrays.append(name)
        cached = _classes[kind] = (identities, tuple(functions), tuple(arrays))
    return cached[1], cached[2]


def _holds_something(function: FunctionType) -> bool:
    """Whether there is anything to find in a method besides what its arguments bring."""
    # A method that calls super() closes over its class.
    closed = [cell for cell in function.__closure__ or () if not _is_class(cell)]
    plain = (type(None), bool, int, float, str)
    defaults = [value for value in function.__defaults__ or () if not isinstance(value, plain)]
    names = global_names(function.__code__, function.__globals__)
    return bool(closed or defaults or names or function.__kwdefaults__ or function.__dict__)


def _is_class(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, type)
    except ValueError:  # not bound yet
        return False
