"""Running models whose weights lie on disk, of which no more than a block is read at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.interrupts import interruptible, uninterrupted
from mlx_tune.quantization.formats.lazy_arrays import read_array
from mlx_tune.quantization.models.layers import EMBEDDINGS, weight_shape
from mlx_tune.quantization.models.sites import WalkedModel, own_arrays
from mlx_tune.substitution import ModuleCall, intercepted
from mlx_tune.upstream import is_lazy


@contextmanager
def reading(module: nn.Module) -> Iterator[None]:
    """Have a module's weights read while the block runs, if they lie on disk, and forgotten after it.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> with reading(layer):
        ...     is_lazy(layer.weight)
        False
        >>> is_lazy(layer.weight)
        True
    """
    olds: list[tuple[nn.Module, str, mx.array]] = []
    with uninterrupted():
        try:
            for site in WalkedModel(module).sites:
                for name, value in dict(site.module).items():
                    if isinstance(value, mx.array) and is_lazy(value):
                        olds.append((site.module, name, value))
                        dict.__setitem__(site.module, name, read_array(value))
            with interruptible():
                yield
        finally:
            for owner, name, value in olds:
                dict.__setitem__(owner, name, value)


@contextmanager
def reading_in_turn(model: WalkedModel, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Have each block of a model, and each layer outside of all, read for its calls and evaluated, and then forgotten.

    Args:
        model: The model; where none of its weights lie on disk, nothing is done.
        blocks: Its blocks.
    """
    own = [(site.module, list(own_arrays(site.module).values())) for site in model.sites]
    if not any(is_lazy(array) for _, arrays in own for array in arrays):
        yield
        return
    inside = {id(site.module) for block in blocks for site in WalkedModel(block).sites}
    outside = [module for module, arrays in own if arrays and id(module) not in inside]
    words = {weight_shape(s.module)[0] for s in model.sites if isinstance(s.module, EMBEDDINGS)}

    def see(call: ModuleCall) -> object:
        with reading(call.module):
            output = call.run()
            # Nobody may want a model's answers, which are wide.
            if not (isinstance(output, mx.array) and output.shape[-1] in words):
                mx.eval(output)
        return output

    with intercepted([*blocks, *outside], see):
        yield
