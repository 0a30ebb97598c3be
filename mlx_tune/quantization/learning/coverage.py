"""The part of a calibration that reaches each layer, and each expert: what was not seen has nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.models.arithmetic import evaluation_mode
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.interception import intercepted
from mlx_tune.quantization.models.sites import module_at
from mlx_tune.quantization.planning.plan import LayerPlan
from mlx_tune.units import format_names

#: Inputs from which on a layer or an expert counts as reached, where the layer that got most has four times as many.
FEW_INPUTS = 32


@dataclass(frozen=True)
class Reach:
    """The inputs of one layer.

    Attributes:
        inputs: Their number, over all experts.
        experts: Their number for each expert of a stack; None for other layers.
    """

    inputs: int
    experts: tuple[int, ...] | None = None

    def enough(self, most: int) -> bool:
        """True where as much was seen of it as a measurement takes.

        Args:
            most: Inputs of the layer that got most.
        """
        few = min(FEW_INPUTS, most / 4)
        if self.experts is None:
            return self.inputs > 0 and self.inputs >= few
        return 2 * sum(count > 0 and count >= few for count in self.experts) > len(self.experts)


def measure_reach(model: nn.Module, layers: Sequence[LayerPlan], batches: Sequence[Batch]) -> dict[str, Reach]:
    """Run the model and count what layers are given; of other than experts' routes nothing is evaluated.

    Args:
        model: The model.
        layers: Layers of its plan.
        batches: Its arguments.

    Returns:
        By path, all layers.
    """
    paths = {id(module_at(layer.model, path)): layer.path for layer in layers for path in layer.paths}
    stacks = {layer.path: layer.shape[0] for layer in layers if len(layer.shape) == 3}
    found = {layer.path: Reach(0, (0,) * stacks[layer.path] if layer.path in stacks else None) for layer in layers}
    routes: list[tuple[str, mx.array]] = []

    def see(module: nn.Module, method: str, run: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        path = paths[id(module)]
        x = next((value for value in arguments if isinstance(value, mx.array)), None)
        indices = arguments[1] if len(arguments) > 1 else keywords.get("indices")
        if path in stacks and isinstance(indices, mx.array):
            routes.append((path, indices))
        elif x is not None:
            looked_up = isinstance(module, nn.Embedding) and method == "__call__"
            count = x.size if looked_up else x.size // max(1, x.shape[-1])
            found[path] = Reach(found[path].inputs + count, found[path].experts)
        return run(*arguments, **keywords)

    modules = [module_at(layer.model, path) for layer in layers for path in layer.paths]
    with evaluation_mode(model), intercepted(modules, see):
        for batch in batches:
            batch.inputs.call(model)
            for path, indices in routes:
                counts = count_experts(indices, stacks[path])
                before = found[path].experts or ()
                found[path] = Reach(
                    found[path].inputs + sum(counts), tuple(a + b for a, b in zip(before, counts, strict=True))
                )
            routes.clear()
    return found


def count_experts(indices: mx.array, experts: int) -> list[int]:
    """The number of times that each expert is chosen.

    Examples:
        >>> count_experts(mx.array([[0, 2], [2, 1]]), 4)
        [1, 1, 2, 0]
    """
    chosen: Any = indices.reshape(-1, 1) == mx.arange(experts)
    counts: list[int] = chosen.sum(0).tolist()
    return counts


def note_of_experts(counts: Sequence[int]) -> str | None:
    """Experts that calibration did not reach, or hardly, for a layer's remark; None where there are none.

    Examples:
        >>> note_of_experts([100, 0, 7, 80])
        'no calibration input reached expert 1 of 4; few reached expert 2 (7)'
    """
    without = [str(e) for e, count in enumerate(counts) if count == 0]
    few = [f"{e} ({count})" for e, count in enumerate(counts) if 0 < count < FEW_INPUTS]
    parts = []
    if without:
        parts.append(f"no calibration input reached {_named(without)} of {len(counts)}")
    if few:
        parts.append(f"few reached {_named(few)}" if without else f"few calibration inputs reached {_named(few)}")
    return "; ".join(parts) or None


def _named(experts: Sequence[str]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {format_names(experts)}"


def note_of_unreached(paths: Sequence[str]) -> tuple[str, ...]:
    """A sentence on layers that sensitivities could not be measured of."""
    if not paths:
        return ()
    return (
        f"Calibration says nothing of {format_names(paths)}: the error of their weights counts as much as that of "
        "layers like them, and they get no fewer bits than most layers (see remarks).",
    )
