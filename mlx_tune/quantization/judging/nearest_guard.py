"""The cost of rounding to nearest on a part of the evaluation, so that no method does worse without a word."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.formats.packing import dequantize_float32, quantize_nearest
from mlx_tune.quantization.models.batches import Batch, rows_at_most
from mlx_tune.quantization.models.layers import is_quantized
from mlx_tune.quantization.planning.plan import QuantizationPlan
from mlx_tune.substitution import ModuleCall, intercepted

#: Tokens that both are judged on.
_TOKENS = 1024


class Guard:
    """The same model rounded to nearest in the same formats, measured before anything is changed.

    Args:
        plan: The plan for the model, which is unquantized still.
        divergence: Tells how far the model's answers have moved from what they are now.

    Attributes:
        nearest: That of the model rounded.
    """

    def __init__(self, plan: QuantizationPlan, divergence: Callable[[], float]) -> None:
        """Run the model rounded."""
        self._divergence = divergence
        everywhere = [site.module for layer in plan.layers for site in layer.sites]
        modules = {id(site.module): layer for layer in plan.layers for site in layer.sites}
        with intercepted(everywhere, lambda call: _rounded(call, modules[id(call.module)].format)):
            self.nearest = divergence()

    def verdict(self, kind: str, tokens: int) -> str | None:
        """A warning where the model, quantized by now, is worse; None where it is not.

        Args:
            kind: Of the evaluation: "tokens", "loss" or "outputs".
            tokens: The number of tokens that both were judged on, if it is of tokens.
        """
        ours = self._divergence()
        if ours <= self.nearest:
            return None
        where = f"{tokens:,} tokens" if tokens else "one batch"
        measure = {"tokens": "mean KL divergence", "loss": "loss", "outputs": "squared error of outputs"}[kind]
        return (
            f"Worse than method='nearest' in the same formats: {measure} {ours:.4g} against {self.nearest:.4g} on "
            f"{where} of the evaluation"
        )


def watched(plan: QuantizationPlan) -> bool:
    """True for plans that could do worse than rounding to nearest, and whose layers are unquantized still."""
    return plan.method != "nearest" and not any(is_quantized(layer.module) for layer in plan.layers)


def part_of(batches: list[Batch]) -> list[Batch]:
    """Sequences spread over the evaluation, or its first batch where it is of no tokens."""
    if any(batch.tokens is None for batch in batches):
        return batches[:1]
    rows = [row for batch in batches for row in rows_at_most(batch, 1)]
    longest = max(row.tokens.shape[1] for row in rows if row.tokens is not None)
    wanted = max(1, _TOKENS // longest)
    return rows[:: max(1, len(rows) // wanted)][:wanted]


def _rounded(call: ModuleCall, wanted: Format | None) -> object:
    """A layer's call with weights rounded to nearest, which live no longer than the call."""
    assert wanted is not None
    weight, x = call.module["weight"], call.arguments[0]
    if call.looks_up:
        return _nearest(weight[x], wanted)  # a row's groups are its own
    # Without this MLX would round all layers of the model before it computes with the first.
    (after,) = mx.depends([weight], [x])
    try:
        dict.__setitem__(call.module, "weight", _nearest(after, wanted))
        return call.run()
    finally:
        dict.__setitem__(call.module, "weight", weight)


def _nearest(weight: mx.array, wanted: Format) -> mx.array:
    stored = weight.astype(getattr(mx, wanted.scale_dtype)) if wanted.scale_dtype else weight
    return dequantize_float32(*quantize_nearest(stored, **wanted.keywords()), **wanted.keywords())
