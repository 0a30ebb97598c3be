"""Everything that rests on what MLX does and does not promise: the one place to look at when MLX changes.

Each entry names the source in MLX that it was read in. All of it was checked on the versions in `CHECKED`;
`tests/test_upstream.py` has one test for each entry, which fails with a sentence that names it.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import BackendError

#: The versions of MLX on which everything here was checked.
CHECKED = ("0.32.4",)

# Transformed functions. Sources: python/src/mlx_func.cpp (`gc_func_tp_traverse`: the function made, then what it was
# given), python/src/transforms.cpp (`mx.compile` gives `mlx_func` the function, inputs and outputs, `mx.checkpoint`
# and `mx.grad` the function, `mx.vmap` its axes too; `py_custom_function_tp_traverse`).

#: The type of what `mx.compile`, `mx.checkpoint`, `mx.grad`, `mx.vmap` and the like return.
FUNCTION: type = type(mx.checkpoint(abs))

#: The types of functions that MLX's transformations give.
TRANSFORMED = frozenset({FUNCTION, mx.custom_function})


def referents(held: object) -> list[Any]:
    """The objects that something of MLX holds, in MLX's order, apart from its class."""
    return [thing for thing in gc.get_referents(held) if not isinstance(thing, type)]


def function_of(transformed: object) -> Any:
    """The function inside what `mx.compile`, `mx.grad`, `mx.checkpoint` or `mx.custom_function` returned."""
    return referents(transformed)[0 if isinstance(transformed, mx.custom_function) else -1]


def state_of(compiled: object) -> list[Any]:
    """The inputs and outputs that `mx.compile` was given besides the arguments."""
    return referents(compiled)[:2]


def transformation_kind(transformed: object) -> str:
    """The kind of transformation: `compile`, `transform`, or `unknown`, since `mx.checkpoint` looks like `mx.grad`."""
    held = referents(transformed)
    if len(held) == 3 and not isinstance(held[0], int):
        return "compile"  # its inputs and outputs, then the function; vmap has its axes there
    return "unknown" if len(held) == 1 else "transform"


# Drawings of graphs. Source: mlx/graph_utils.cpp (`export_to_dot`, `NodeNamer`).

#: The line of an array that no operation makes.
_LEAF = re.compile(r'{ rank=source; "(\w+)"; }\n')
#: The place where the lines of one operation begin: `{ 123 [label ="Add", shape=rectangle]; }`. Then come the arrays
#: that it reads, `"A" -> 123`, and for each that it makes `{ "B"; }` and `123 -> "B"`.
_OPERATION = '[label ="'


class _Writer:
    def __init__(self, text: list[str]) -> None:
        self.write = text.append


def drawing(*arrays: mx.array, **named: mx.array) -> str:
    """The graph behind lazy arrays as MLX draws it, depth first, with nothing evaluated.

    MLX names arrays `A`, `B` and so on, those that are given a name by that, and takes at most 1024 of them.
    """
    text: list[str] = []
    mx.export_to_dot(_Writer(text), *arrays, **named)
    return "".join(text)


def leaves_in(drawn: str) -> list[str]:
    """The names of the arrays in a drawing that no operation makes."""
    return _LEAF.findall(drawn)


def operations_in(drawn: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """The operations in a drawing, each after those that it needs: name, arrays that it reads, arrays that it makes."""
    operations = _LEAF.sub("", drawn).split(_OPERATION)
    del operations[0]
    for lines in operations:
        quoted = lines.split('"')
        made = 2 - 2 * lines.count("; }")  # from the end: each made array is quoted in two lines
        names = quoted[2::2]
        yield quoted[0], names[:made], names[made::2]


def is_lazy(array: mx.array) -> bool:
    """True where an array is made by an operation that has not been evaluated, and so holds no memory yet.

    MLX has no such question in Python.

    Examples:
        >>> x = mx.ones(3) + 1
        >>> is_lazy(x), mx.eval(x), is_lazy(x)
        (True, None, False)
    """
    return _OPERATION in drawing(array)


# Attributes of modules. Source: python/mlx/nn/layers/base.py (`Module.__init__`).

#: The attribute with the names of the parameters that are not trained.
FROZEN = "_no_grad"
#: The attribute that is true in training mode.
TRAINING = "_training"


def has_mode(module: nn.Module) -> bool:
    """False for a module whose class never calls `super().__init__()`."""
    return TRAINING in vars(module)


def set_mode(module: nn.Module, training: bool) -> None:
    """Put one module into training or evaluation mode, and none below it; `Module.train` also requantizes weights."""
    setattr(module, TRAINING, training)


def frozen(module: nn.Module) -> set[str]:
    """The names of a module's own parameters that are not trained."""
    return set(vars(module).get(FROZEN, ()))


def freeze_also(module: nn.Module, names: set[str]) -> None:
    """Have more of a module's own parameters not trained, whatever its class makes of `freeze`."""
    setattr(module, FROZEN, frozen(module) | names)


# The random stream. Source: python/src/random.cpp (`RandomState`).


def random_key() -> mx.array:
    """The key that MLX's next draw on this thread splits."""
    state: Any = mx.random.state  # MLX's stubs call the list an object
    key: mx.array = state[0]
    return key


def random_stream() -> list[mx.array]:
    """The list of one key that MLX's draws on this thread split from, itself and not a copy.

    `mx.random.state` is a stand-in for every thread's own list since MLX 0.32.1, and cannot be assigned to. Its
    iterator runs over the list itself, and an iterator tells what it runs over, as pickling needs.

    Raises:
        BackendError: This version of MLX keeps its stream in some other way.
    """
    state: Any = mx.random.state
    if isinstance(state, list):  # MLX up to 0.32.0
        return state
    held = iter(state).__reduce__()[1]
    stream = held[0] if held else None
    if not isinstance(stream, list) or len(stream) != 1:
        raise BackendError(
            f"mlx {version('mlx')} keeps its random stream in a way mlx_tune does not know "
            f"({type(state).__name__}), so draws cannot be repeated. Use mlx {CHECKED[-1]}, or report this version."
        )
    return stream
