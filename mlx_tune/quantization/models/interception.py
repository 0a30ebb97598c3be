"""Running a model one block at a time, and up to one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_tune.substitution import Hook, ModuleCall, intercepted


class _Enough(BaseException):  # no error: everything that was wanted has been seen
    """Ends a model's call from inside."""


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


def forward_steps(
    call: Callable[[], object],
    layers: Sequence[tuple[str, nn.Module]],
    blocks: Sequence[tuple[str, nn.Module]] = (),
) -> list[Step]:
    """Find the order in which a model calls its blocks and those of the given layers that are in none.

    The model is called once, and nothing is evaluated.

    Args:
        call: Calls the model once.
        layers: Paths and modules.
        blocks: The same of what is repeated in the model; where nothing is, every layer is a step of its own.

    Returns:
        The steps in the order of their first calls. A layer that is not called is in none.
    """
    inside = tuple(f"{path}." for path, _ in blocks)
    units = [*blocks, *((p, m) for p, m in layers if not p.startswith(inside) and p not in dict(blocks))]
    names = {id(module): path for path, module in units}
    order: list[tuple[str, tuple[object, ...], dict[str, object], object]] = []

    def note(call: ModuleCall) -> object:
        output = call.run()
        order.append((names[id(call.module)], call.arguments, call.keywords, output))
        return output

    with intercepted((module for _, module in units), note):
        call()
    modules, paths = dict(units), [name for name, *_ in order]
    block_paths = {path for path, _ in blocks}
    steps: dict[str, Step] = {}
    sources: list[tuple[str, list[object]]] = []
    last: tuple[str, object] | None = None
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


def run_until(call: Callable[[], object], module: nn.Module, calls: int, hook: Hook) -> None:
    """Call a model up to the last call of one module, whose calls go through a hook.

    Args:
        call: Calls the model once.
        module: Whose calls are wanted.
        calls: The number of them.
        hook: Sees them. The last one's output is not used.
    """
    left = calls

    def counting(seen: ModuleCall) -> object:
        nonlocal left
        left -= 1
        output = hook(seen)
        if left == 0:
            raise _Enough
        return output

    with intercepted([module], counting):
        try:
            call()
        except _Enough:
            return


def _leaves(tree: object) -> list[object]:
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat]


def _same(known: list[object], found: list[object]) -> bool:
    """True where two calls were given the same further arguments: the very same arrays, and equal plain values."""
    if len(known) != len(found):
        return False
    plain = (str, int, float, bool, type(None))
    return all(
        a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b) for a, b in zip(known, found, strict=True)
    )
