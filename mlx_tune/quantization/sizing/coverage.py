"""The part of a calibration that reaches each layer, and each expert: what was not seen has nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.learning.experts import FEW_INPUTS
from mlx_tune.quantization.learning.moments import count_experts
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.interception import Step, forward_steps
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.plan import LayerPlan
from mlx_tune.substitution import ModuleCall, intercepted


@dataclass(frozen=True)
class Coverage:
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


def measure_coverage(
    model: WalkedModel,
    layers: Sequence[LayerPlan],
    batches: Sequence[Batch],
    blocks: Sequence[tuple[str, nn.Module]] = (),
) -> tuple[dict[str, Coverage], list[Step]]:
    """Run the model and count what layers are given; of other than experts' routes nothing is evaluated.

    Args:
        model: The model.
        layers: Layers of its plan.
        batches: Its arguments.
        blocks: Paths and modules of its blocks.

    Returns:
        By path, all layers, and the order in which blocks and other layers are called.
    """
    paths = {id(site.module): layer.path for layer in layers for site in layer.sites}
    stacks = {layer.path: layer.shape[0] for layer in layers if len(layer.shape) == 3}
    found = {layer.path: Coverage(0, (0,) * stacks[layer.path] if layer.path in stacks else None) for layer in layers}
    routes: list[tuple[str, mx.array]] = []

    def see(call: ModuleCall) -> object:
        path = paths[id(call.module)]
        x = next((value for value in call.arguments if isinstance(value, mx.array)), None)
        if path in stacks and isinstance(call.experts, mx.array):
            routes.append((path, call.experts))
        elif x is not None:
            count = x.size if call.looks_up else x.size // max(1, x.shape[-1])
            found[path] = Coverage(found[path].inputs + count, found[path].experts)
        return call.run()

    modules = [(site.path, site.module) for layer in layers for site in layer.sites]
    steps: list[Step] = []
    with model.evaluation_mode(), intercepted([module for _, module in modules], see):
        for batch in batches:
            call = partial(batch.inputs.call, model.model)
            if steps:
                call()
            else:
                steps = forward_steps(call, modules, blocks)
            for path, indices in routes:
                counts = count_experts(indices, stacks[path])
                before = found[path].experts or ()
                found[path] = Coverage(
                    found[path].inputs + sum(counts), tuple(a + b for a, b in zip(before, counts, strict=True))
                )
            routes.clear()
    return found, steps
