"""Proof on the user's own model: gradients with and without checkpointing, next to each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_tune.checkpointing.blocks import checkpoint_blocks
from mlx_tune.checkpointing.captures import Walk
from mlx_tune.checkpointing.recompute import plainly, runs_again
from mlx_tune.checkpointing.wrap import checkpoint, is_checkpointed, kept_names, unwrap
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.graphs.calls import taking
from mlx_tune.state import Snapshot
from mlx_tune.tables import render_table

#: How far apart two orders of the same sum may be, relative to the gradient's largest entry.
_RELATIVE = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}
_ROWS = 20  # how many parameters the table shows


@dataclass(frozen=True)
class GradientDifference:
    """One parameter's gradient, with and without checkpointing.

    Attributes:
        path: The parameter.
        largest: The largest entry of the plain gradient, its absolute value.
        difference: The largest absolute difference between the two gradients; infinite where one is not a number
            and the other is.
        noise: The same between two plain runs: what this machine does not repeat by itself.
        tolerance: What the difference may be: rounding in this type, or twice the noise.
        became_zero: The plain gradient is not zero everywhere and the checkpointed one is.
    """

    path: str
    largest: float
    difference: float
    noise: float
    tolerance: float
    became_zero: bool

    @property
    def ok(self) -> bool:
        """Whether the two agree."""
        return self.difference <= self.tolerance and not self.became_zero


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_checkpoint` found. Its `str` is a table.

    Attributes:
        blocks: The paths of the checkpointed modules.
        loss: The loss without checkpointing.
        loss_difference: How far the loss with checkpointing is from it.
        loss_tolerance: How far it may be.
        parameters: One entry for each trainable parameter, the largest difference first.
        idle: The paths of those of `blocks` that were not run again, so that nothing was put to the test there: they
            are in evaluation mode, or the loss does not call them.
    """

    blocks: tuple[str, ...]
    loss: float
    loss_difference: float
    loss_tolerance: float
    parameters: tuple[GradientDifference, ...]
    idle: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the loss and every gradient agree."""
        return self.loss_difference <= self.loss_tolerance and all(p.ok for p in self.parameters)

    @property
    def wrong(self) -> tuple[GradientDifference, ...]:
        """The parameters whose gradients do not agree."""
        return tuple(p for p in self.parameters if not p.ok)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "ok": self.ok, "parameters": [{**asdict(p), "ok": p.ok} for p in self.parameters]}

    def __str__(self) -> str:
        """The largest differences, and the verdict."""
        shown = self.parameters[:_ROWS]
        rows = [
            (
                p.path,
                f"{p.largest:.3g}",
                f"{p.difference:.3g}",
                f"{p.tolerance:.3g}",
                "ok" if p.ok else "ZERO" if p.became_zero else "WRONG",
            )
            for p in shown
        ]
        count = len(self.wrong)
        notes = (
            [f"and {len(self.parameters) - len(shown)} more, none worse"] if len(shown) < len(self.parameters) else []
        )
        notes.append(f"loss {self.loss:.6g}, difference {self.loss_difference:.3g}")
        if self.ok:
            notes.append("Checkpointing changes no gradient.")
        else:
            notes.append(f"{count} of {len(self.parameters)} gradients are wrong.")
        if self.idle:
            notes.append(
                f"{len(self.idle)} of {len(self.blocks)} blocks did not run again, so nothing was tested there: "
                f"{', '.join(self.idle[:_ROWS])}{', ...' if len(self.idle) > _ROWS else ''}. They are in evaluation "
                "mode, or the loss does not call them."
            )
        if any(p.became_zero for p in self.parameters):
            notes.append(
                "ZERO: the block uses this parameter where checkpoint() cannot see it. Pass it as an argument, or "
                "make it an attribute of the block."
            )
        if any(not p.ok and not p.became_zero for p in self.parameters):
            notes.append(
                "WRONG: the block does something else when it is run again, or uses this parameter where checkpoint() "
                "cannot see it. Look for Python's or NumPy's random numbers, a counter or a clock in it; pass the "
                "parameter as an argument, or make it an attribute of the block."
            )
        return render_table(
            ["parameter", "largest gradient", "difference", "allowed", ""],
            rows,
            title=f"{len(self.blocks)} checkpointed block{'' if len(self.blocks) == 1 else 's'} against none",
            notes=notes,
        )


def verify_checkpoint(model: nn.Module, loss: Callable[..., Any], *args: Any) -> VerifyReport:
    """Compare a model's gradients with and without checkpointing, with the same random draws.

    Three gradients are taken: two with every block plain, which tells what this machine does not repeat by itself,
    and one with the blocks as they are checkpointed now. Where none is, the repeated blocks are for this call.
    The model, its training mode and the random streams are as before afterwards.

    Args:
        model: The model, checkpointed or not.
        loss: What `nn.value_and_grad(model, loss)` takes: a function that returns a scalar, or a tuple that starts
            with one.
        *args: What to call it with; a single tuple or dictionary is spread over its arguments where it takes several.
            Where it takes one argument more than these, the model goes first.

    Returns:
        The report; `.ok` is the verdict.

    Raises:
        InvalidArgumentError: `model` is no module, has no trainable parameters, the loss is no scalar, or it does not
            take these arguments.
        CheckpointError: Nothing is checkpointed, and the model has no repeated block.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)))
        >>> report = mt.verify_checkpoint(model, lambda x: model(x).square().sum(), mx.ones((2, 4)))
        >>> report.ok, len(report.blocks), mt.is_checkpointed(model.layers[0])
        (True, 2, False)
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"verify_checkpoint() takes an nn.Module, and was given {type(model).__name__}.")
    if not tree_flatten(model.trainable_parameters()):
        raise InvalidArgumentError(
            f"{type(model).__name__} has no trainable parameters, so there is no gradient to compare: "
            "call unfreeze() on what you train."
        )
    loss = taking(loss, args, model, first=model)
    handle = None if any(map(is_checkpointed, model.modules())) else checkpoint_blocks(model)
    try:
        found = [(path, id(module)) for path, module in model.named_modules() if is_checkpointed(module)]
        wrapped = {path or "(model)": block for path, block in sorted(found, key=lambda item: _in_order(item[0]))}
        run = _Runs(model, args)

        def gradients() -> tuple[mx.array, dict[str, mx.array]]:
            with run:
                value, grads = nn.value_and_grad(model, loss)(*args)
                value = value[0] if isinstance(value, tuple) else value
                mx.eval(value, grads)
            return value, dict(tree_flatten(grads))

        with _plain(model):
            value, plain = gradients()
            again = gradients()[1]
        noise = {path: _difference(plain[path], again[path]) for path in plain}
        del again
        with runs_again() as ran:
            checked_value, checked = gradients()
    finally:
        if handle is not None:
            handle.undo()
    parameters = sorted(
        (_compared(path, plain[path], checked[path], noise[path]) for path in plain),
        key=lambda p: (p.ok, -p.difference / (p.largest or 1.0), p.path),
    )
    loss_value = _number(value)
    return VerifyReport(
        blocks=tuple(wrapped),
        loss=loss_value,
        loss_difference=_difference(value, checked_value),
        loss_tolerance=_RELATIVE.get(value.dtype, 1e-6) * (abs(loss_value) if math.isfinite(loss_value) else 0.0),
        parameters=tuple(parameters),
        idle=tuple(path for path, block in wrapped.items() if block not in ran),
    )


def _in_order(path: str) -> list[tuple[int, str]]:
    """Sorts paths as a reader does: `layers.2` before `layers.10`."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]


class _Runs:
    """Each run starts from the same state and draws, on copies, and leaves everything as it found it."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._walk = Walk()
        self._walk.add(model)
        self._walk.add(args)
        self._streams = Snapshot(())

    def __enter__(self) -> None:
        # A second handle on each array: a block that writes into one in place does not reach the original.
        arrays = [copy.copy(array) for array in self._walk.arrays]
        for note in self._walk.notes:
            note.place.put(note.filled(arrays))

    def __exit__(self, *_: object) -> None:
        for note in self._walk.notes:
            note.place.put(note.items)
        self._streams.restore()


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Without checkpointing for a while, of functions too.

    The modules are unwrapped, so that a compiled part of the loss is traced anew.
    """
    wrapped = [(module, kept_names(module)) for module in model.modules() if is_checkpointed(module)]
    for module, _ in wrapped:
        unwrap(module)
    try:
        with plainly():
            yield
    finally:
        for module, names in wrapped:
            checkpoint(module, keep=names)


def _difference(a: mx.array, b: mx.array) -> float:
    """The largest absolute difference, with no-numbers in the same place being the same."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    same = (a == b) | (mx.isnan(a) & mx.isnan(b))
    largest = _number(mx.max(mx.where(same, 0.0, mx.abs(a - b)))) if a.size else 0.0
    return math.inf if math.isnan(largest) else largest


def _compared(path: str, plain: mx.array, checked: mx.array, noise: float) -> GradientDifference:
    largest = _number(mx.max(mx.abs(plain.astype(mx.float32)))) if plain.size else 0.0
    return GradientDifference(
        path=path,
        largest=largest,
        difference=_difference(plain, checked),
        noise=noise,
        tolerance=max(_RELATIVE.get(plain.dtype, 1e-6) * (largest if math.isfinite(largest) else 0.0), 2 * noise),
        became_zero=largest > 0 and not bool(mx.any(checked != 0).item()),
    )


def _number(array: mx.array) -> float:
    value: Any = array.item()
    return float(value)
