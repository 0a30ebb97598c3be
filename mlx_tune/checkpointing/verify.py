"""Proof on the user's own model: gradients with and without checkpointing, next to each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_tune.checkpointing.block.recompute import plainly, runs_again
from mlx_tune.checkpointing.block.wrap import checkpoint, is_checkpointed, kept_names, require_initialized, unwrap
from mlx_tune.checkpointing.blocks import checkpoint_blocks
from mlx_tune.checkpointing.verify_report import VERDICTS, GradientDifference, VerifyReport
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.graphs.tracing.trace import taking
from mlx_tune.measuring.float32_products import rounds_factors
from mlx_tune.reach.walk import Walk
from mlx_tune.state import Snapshot
from mlx_tune.units import number

_RELATIVE = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}


def verify_checkpoint(model: nn.Module, loss: Callable[..., object], *args: object) -> VerifyReport:
    """Compare a model's gradients with and without checkpointing, with the same random draws.

    Three gradients are taken: two with every block plain, which tells what this machine does not repeat by itself,
    and one with the blocks as they are checkpointed now. Where none is, the repeated blocks are for this call.
    The model, its training mode and the random streams are as before afterwards.

    Each parameter gets one of three verdicts. A gradient that is zero both ways, or nothing but rounding beside the
    model's largest, is not tested, and no gradient is where the loss is not a number or no block runs again.

    Args:
        model: The model, checkpointed or not.
        loss: The `loss` of `nn.value_and_grad(model, loss)`: a function that returns a scalar, or a tuple that starts
            with one.
        *args: The loss's arguments; a single tuple or dictionary is spread over them where it takes several.
            Where it takes one argument more than these, the model goes first.

    Returns:
        The report; `.ok` is true where at least one gradient was tested and none differs.

    Raises:
        InvalidArgumentError: `model` is no module, has no trainable parameters, the loss is no scalar, or it does not
            take these arguments.
        CheckpointError: No block is checkpointed, and the model has no repeated block; or a module of the model was
            made without `super().__init__()`.

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
    if not callable(loss):
        raise InvalidArgumentError(
            f"loss={loss!r}: give a function that returns a scalar, as nn.value_and_grad(model, loss) takes it."
        )
    require_initialized(model.named_modules())
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

        def scalar(*args: object) -> object:
            value = loss(*args)
            first = value[0] if isinstance(value, tuple) and value else value
            if not isinstance(first, mx.array) or first.shape != ():
                given = list(first.shape) if isinstance(first, mx.array) else first
                raise InvalidArgumentError(
                    f"The loss must return a scalar array, or a tuple that starts with one, and it returned {given!r}."
                )
            return value

        def gradients() -> tuple[mx.array, dict[str, mx.array]]:
            with run:
                value, grads = nn.value_and_grad(model, scalar)(*args)
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
    loss_value = number(value)
    loss_difference = _difference(value, checked_value)
    if not ran:
        reason = "no checkpointed block ran again"
    elif not math.isfinite(loss_value) and loss_difference == 0:
        reason = f"the loss is {loss_value} both ways"
    else:
        reason = ""
    largest = {path: _largest(gradient) for path, gradient in plain.items()}
    most = max(largest.values())
    parameters = sorted(
        (_compared(path, plain[path], checked[path], noise[path], largest[path], most, reason) for path in plain),
        key=lambda p: (VERDICTS.index(p.verdict), -p.difference / (p.largest or 1.0), p.path),
    )
    return VerifyReport(
        blocks=tuple(wrapped),
        loss=loss_value,
        loss_difference=loss_difference,
        loss_tolerance=_rounding(value.dtype) * (abs(loss_value) if math.isfinite(loss_value) else 0.0),
        parameters=tuple(parameters),
        idle=tuple(path for path, block in wrapped.items() if block not in ran),
    )


def _in_order(path: str) -> list[tuple[int, str]]:
    """Sorts paths as a reader does: `layers.2` before `layers.10`."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]


class _Runs:
    """Each run starts from the same state and draws, on copies, and leaves everything as it found it."""

    def __init__(self, model: nn.Module, args: tuple[object, ...]) -> None:
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
    largest = number(mx.max(mx.where(same, 0.0, mx.abs(a - b)))) if a.size else 0.0
    return math.inf if math.isnan(largest) else largest


def _compared(
    path: str, plain: mx.array, checked: mx.array, noise: float, largest: float, most: float, reason: str
) -> GradientDifference:
    """One row.

    Args:
        path: The parameter.
        plain: Its gradient without checkpointing.
        checked: With it.
        noise: The distance of two plain gradients.
        largest: The largest finite entry of `plain`.
        most: The same over all parameters. Where terms of this size cancel, as in the bias of a key, whose true
            gradient is zero, their rounding errors stay.
        reason: Why no parameter is put to the test, if none is.
    """
    difference = _difference(plain, checked)
    own = max(_rounding(plain.dtype) * largest, 2 * noise)
    became_zero = largest > _rounding(mx.float32) * most and not bool(mx.any(checked != 0).item())
    if not reason and difference <= own and largest == 0:
        finite = not plain.size or bool(mx.all(mx.isfinite(plain)).item())
        reason = f"the gradient is {'zero' if finite else 'not finite'} both ways"
    elif not reason and difference > own and largest <= _cancelled(plain.dtype) * most:
        reason = "the gradient is nothing but rounding, beside the model's largest"
    return GradientDifference(
        path=path,
        largest=largest,
        difference=difference,
        noise=noise,
        tolerance=max(own, _cancelled(plain.dtype) * most),
        became_zero=became_zero,
        reason=reason,
    )


def _rounding(dtype: mx.Dtype) -> float:
    """The distance that two orders of the same sum may be apart, relative to its value."""
    return max(_RELATIVE.get(dtype, 1e-6), _of_factors(dtype))


def _cancelled(dtype: mx.Dtype) -> float:
    """The remainder of terms that cancel, relative to their size."""
    return max(1e-6, float(mx.finfo(dtype).eps), _of_factors(dtype))


def _of_factors(dtype: mx.Dtype) -> float:
    """The rounding of the factors of float32 products, relative to them: TF32 keeps ten bits."""
    return 2.0**-10 if dtype == mx.float32 and rounds_factors() else 0.0


def _largest(gradient: mx.array) -> float:
    """The largest finite entry, its absolute value; zero where there is none."""
    found = mx.abs(gradient.astype(mx.float32))
    return number(mx.max(mx.where(mx.isfinite(found), found, 0.0))) if found.size else 0.0
