"""Recording what layers are given while a model runs, and running a model one block at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_tune.errors import CheckpointError
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.substitution import subclass, substituted

#: `hook(module, method, run, arguments, keywords)` gives back what the call is to give back.
Hook = Callable[[nn.Module, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

#: Ways in which modules are called; a tied embedding is an output head through the second.
_METHODS = ("__call__", "as_linear")


class _Enough(BaseException):  # no error: everything that was wanted has been seen
    """Ends a model's call from inside."""


@contextmanager
def intercepted(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Route every call of these module objects, and of no others, through a hook while the block runs.

    Args:
        modules: The modules; one named twice is intercepted once.
        hook: Called instead of the module; `run(*arguments, **keywords)` is the module itself.

    Examples:
        >>> seen = []
        >>> layer = nn.Linear(2, 2)
        >>> with intercepted([layer], lambda m, name, run, a, k: seen.append(a[0].shape) or run(*a, **k)):
        ...     y = layer(mx.ones((3, 2)))
        >>> seen
        [(3, 2)]
    """
    with substituted((module, _listening(type(module), hook)) for module in modules):
        yield


def _listening(kind: type, hook: Hook) -> type:
    def through(name: str) -> Callable[..., Any]:
        method = getattr(kind, name)

        def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
            return hook(self, name, functools.partial(method, self), arguments, keywords)

        return call

    return subclass(kind, {name: through(name) for name in _METHODS if hasattr(kind, name)})


@dataclass(frozen=True)
class Step:
    """One step of a model's forward pass: a block, or a layer outside of all blocks.

    Attributes:
        path: Of the block or the layer.
        module: It.
        follows: Path of the step whose output is this one's first argument and whose model-given arguments were
            the same as those of an earlier step, so that it can be called without the model; None where it cannot.
        like: Path of the step whose further arguments this one shares; itself where it brings new ones.
        calls: The number of its calls in one pass.
    """

    path: str
    module: nn.Module
    follows: str | None
    like: str
    calls: int


def forward_steps(model: nn.Module, batch: Batch, layers: Sequence[tuple[str, nn.Module]]) -> list[Step]:
    """Find the order in which a model calls its blocks and those of the given layers that are in none.

    The model is called once, and nothing is evaluated.

    Args:
        model: The model.
        batch: The arguments of one call.
        layers: Paths and modules.

    Returns:
        The steps in the order of their first calls. A layer that is not called is in none.
    """
    blocks = blocks_of(model)
    inside = tuple(f"{path}." for path, _ in blocks)
    units = [*blocks, *((p, m) for p, m in layers if not p.startswith(inside) and p not in dict(blocks))]
    names = {id(module): path for path, module in units}
    order: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def note(module: nn.Module, method: str, run: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        output = run(*arguments, **keywords)
        order.append((names[id(module)], arguments, keywords, output))
        return output

    with intercepted((module for _, module in units), note):
        batch.inputs.call(model)
    modules, paths = dict(units), [name for name, *_ in order]
    block_paths = {path for path, _ in blocks}
    steps: dict[str, Step] = {}
    sources: list[tuple[str, list[Any]]] = []
    last: tuple[str, Any] | None = None
    for path, arguments, keywords, output in order:
        extras = _leaves((arguments[1:], keywords))
        like = next((name for name, known in sources if _same(known, extras)), path)
        if path in block_paths and like == path:
            sources.append((path, extras))
        chained = (
            last is not None
            and path in block_paths
            and like != path
            and paths.count(path) == 1
            and isinstance(last[1], mx.array)
            and bool(arguments)
            and arguments[0] is last[1]
        )
        if path not in steps:
            steps[path] = Step(path, modules[path], last[0] if chained and last else None, like, paths.count(path))
        if path in block_paths:
            last = (path, output)
    return list(steps.values())


def run_until(model: nn.Module, batch: Batch, module: nn.Module, calls: int, hook: Hook) -> None:
    """Call the model up to the last call of one module, whose calls go through a hook.

    Args:
        model: The model.
        batch: The arguments of one call.
        module: Whose calls are wanted.
        calls: The number of them.
        hook: Sees them. The last one's output is not used.
    """
    left = calls

    def counting(*call: Any) -> Any:
        nonlocal left
        left -= 1
        output = hook(*call)
        if left == 0:
            raise _Enough
        return output

    with intercepted([module], counting):
        try:
            batch.inputs.call(model)
        except _Enough:
            return


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from mlx_tune.checkpointing.blocks import find_blocks

    try:
        return [block for stack in find_blocks(model) for block in stack]
    except CheckpointError:
        return []  # nothing is repeated: every layer is a step of its own


def _leaves(tree: Any) -> list[Any]:
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat]


def _same(known: list[Any], found: list[Any]) -> bool:
    """True where two calls were given the same further arguments: the very same arrays, and equal plain values."""
    if len(known) != len(found):
        return False
    plain = (str, int, float, bool, type(None))
    return all(
        a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b) for a, b in zip(known, found, strict=True)
    )
