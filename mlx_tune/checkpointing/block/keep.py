"""Values inside a block that are saved instead of computed again.

`keep(array, name)` marks a value; a block checkpointed with that name in `keep=` gives it out as one more output,
so that it is there when the gradient is taken. The block is then run again with the saved value in the place of
the one it computes, and since MLX is lazy nothing that only led to the value is evaluated.

The gradient has to pass from the saved value, where the rest of the block used it, to the computed one, which
nothing evaluates. No operation could join the two (an operation's inputs are evaluated), so two functions with
gradients of their own do: one takes the cotangent off the saved value, the other hands it to the computed one.
MLX visits operations in the reverse of the order in which they were found from the outputs, and a kept value is
found before anything that uses it, so the first always runs before the second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

import mlx.core as mx

from mlx_tune.errors import CheckpointError, InvalidArgumentError
from mlx_tune.graphs.tracing.recomputation import is_differentiable

_thread = threading.local()


class Frame:
    """The marks of one run of a block.

    Args:
        names: Which marks to save.
        saved: The saved values, where this is the run for the gradient.

    Attributes:
        values: The marked values in order: computed ones in a first run, links to them in a run for the gradient.
        seen: Every name that was marked, saved or not.
    """

    def __init__(
        self,
        names: Collection[str],
        saved: list[mx.array] | None = None,
    ) -> None:
        self.names = names
        self.values: list[mx.array] = []
        self.seen: set[str] = set()
        self._saved = saved
        self._outer: Frame | None = None

    def __enter__(self) -> Frame:
        """Marks on this thread are this run's now."""
        self._outer = getattr(_thread, "frame", None)
        _thread.frame = self
        return self

    def __exit__(self, *_: object) -> None:
        """Marks are the enclosing block's again."""
        _thread.frame = self._outer

    def mark(self, array: mx.array, name: str) -> mx.array:
        """Save this value, or take the saved one for it."""
        self.seen.add(name)
        if name not in self.names:
            return array
        if self._saved is None:
            self.values.append(array)
            return array
        index = len(self.values)
        if index >= len(self._saved) or self._saved[index].shape != array.shape:
            raise CheckpointError(
                f"keep({name!r}) marked {array.shape} as value {index + 1} when the block was run again, where the "
                f"first run had marked {[tuple(a.shape) for a in self._saved]}. A checkpointed block must do the "
                "same each time; something it reads has changed in between."
            )
        if not is_differentiable(array):
            self.values.append(array)
            return self._saved[index]
        use, link = _linked(self._saved[index], array)
        self.values.append(link)
        return use


def _linked(saved: mx.array, computed: mx.array) -> tuple[mx.array, mx.array]:
    """The saved value to go on with, and an output that passes its cotangent to the computed one."""
    passed: list[mx.array] = []

    def take(cotangent: mx.array) -> mx.array:
        # A second derivative comes by here again, for the saved value itself, when the first has long passed on.
        if not passed:
            passed.append(cotangent)
        return cotangent

    def hand_over(cotangent: mx.array) -> mx.array:
        return cotangent + passed[0] if passed else cotangent

    return with_gradient(take)(saved), with_gradient(hand_over)(computed)


def with_gradient(gradient: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """The identity, with a gradient of its own."""
    identity: Any = mx.custom_function(lambda array: array)
    identity.vjp(lambda _primal, cotangent, _output: gradient(cotangent))
    return identity  # type: ignore[no-any-return]


def keep(array: mx.array, name: str) -> mx.array:
    """Mark a value inside a block, to be saved instead of computed again.

    Only does something while a block runs that was checkpointed with this name: `checkpoint(block, keep=[name])`.
    Anywhere else it returns the array as it is, so that the mark can stay in the model. Where checkpointed blocks
    are nested, the mark is the innermost one's. A name may be marked several times in a block; all are saved.

    Args:
        array: The value, of any shape and type: most worth it for the results of large matrix products.
        name: A name for it.

    Returns:
        The value to go on with. Use it instead of `array`.

    Raises:
        InvalidArgumentError: `array` is no array, or `name` no string.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_tune as mt
        >>> def block(x, w):
        ...     return mx.tanh(mt.keep(x @ w, "product")) * 2
        >>> fast = mt.checkpoint(block, keep=["product"])
        >>> x, w = mx.ones((2, 2)), mx.ones((2, 2))
        >>> loss = lambda w: fast(x, w).sum()
        >>> mx.grad(loss)(w).shape
        (2, 2)
    """
    if not isinstance(array, mx.array):
        raise InvalidArgumentError(f"keep() marks an mx.array, and was given {type(array).__name__} for {name!r}.")
    if not isinstance(name, str):
        raise InvalidArgumentError(f"keep(array, name) needs a string as the name, and was given {name!r}.")
    frame: Frame | None = getattr(_thread, "frame", None)
    return array if frame is None else frame.mark(array, name)
