"""The cost of rounding to nearest on a part of the evaluation, so that no method does worse without a word."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.judging.evaluation import Loss, prepare
from mlx_tune.quantization.models.batches import Batch, count_tokens, rows_at_most
from mlx_tune.quantization.models.dense import dequantize_arrays
from mlx_tune.quantization.models.interception import intercepted
from mlx_tune.quantization.models.sites import is_quantized, module_at
from mlx_tune.quantization.models.stored_outputs import OutputStore
from mlx_tune.quantization.planning.plan import QuantizationPlan
from mlx_tune.quantization.sizing.sensitivity import divergence_of

#: Tokens that both are judged on.
_TOKENS = 1024


class Guard:
    """The same model rounded to nearest in the same formats, measured before anything is changed.

    Args:
        plan: The plan for the model, which is unquantized still.
        judge: The evaluation.
        loss: The caller's loss.
        store: An empty one, open until `verdict` has been asked for.

    Attributes:
        nearest: Its divergence from the model as it is.
    """

    def __init__(self, plan: QuantizationPlan, judge: list[Batch], loss: Loss | None, store: OutputStore) -> None:
        """Run the model on a part of the evaluation, as it is and rounded."""
        model = plan.layers[0].model
        self._comparison, self._store = prepare(model, _part(judge), loss), store
        self._comparison.record(model, store, floor=False)
        modules = {id(module_at(model, path)): layer for layer in plan.layers for path in layer.paths}

        def rounded(module: nn.Module, method: str, run: Any, arguments: Any, keywords: Any) -> Any:
            return _rounded(module, modules[id(module)].format, method, run, arguments, keywords)

        everywhere = [module_at(model, path) for layer in plan.layers for path in layer.paths]
        with intercepted(everywhere, rounded):
            self.nearest = divergence_of(self._comparison.judge(model, store))

    def verdict(self, model: nn.Module) -> str | None:
        """A warning where the model, quantized by now, is worse; None where it is not."""
        ours = divergence_of(self._comparison.judge(model, self._store))
        if ours <= self.nearest:
            return None
        tokens = count_tokens(self._comparison.parts)
        where = f"{tokens:,} tokens" if tokens else "one batch"
        kinds = {"tokens": "mean KL divergence", "loss": "loss", "outputs": "squared error of outputs"}
        measure = kinds[self._comparison.kind]
        return (
            f"Worse than method='nearest' in the same formats: {measure} {ours:.4g} against {self.nearest:.4g} on "
            f"{where} of the evaluation"
        )


def watched(plan: QuantizationPlan) -> bool:
    """True for plans that could do worse than rounding to nearest, and whose layers are unquantized still."""
    return plan.method != "nearest" and not any(is_quantized(layer.module) for layer in plan.layers)


def _part(batches: list[Batch]) -> list[Batch]:
    """Sequences spread over the evaluation, or its first batch where it is of no tokens."""
    if any(batch.tokens is None for batch in batches):
        return batches[:1]
    rows = [row for batch in batches for row in rows_at_most(batch, 1)]
    longest = max(row.tokens.shape[1] for row in rows if row.tokens is not None)
    wanted = max(1, _TOKENS // longest)
    return rows[:: max(1, len(rows) // wanted)][:wanted]


def _rounded(module: nn.Module, wanted: Format | None, method: str, run: Any, arguments: Any, keywords: Any) -> Any:
    """A layer's call with weights rounded to nearest, which live no longer than the call."""
    assert wanted is not None
    weight, x = module["weight"], arguments[0]
    if isinstance(module, nn.Embedding) and method == "__call__":
        return _nearest(weight[x], wanted)  # a row's groups are its own
    # Without this MLX would round all layers of the model before it computes with the first.
    (after,) = mx.depends([weight], [x])
    try:
        dict.__setitem__(module, "weight", _nearest(after, wanted))
        return run(*arguments, **keywords)
    finally:
        dict.__setitem__(module, "weight", weight)


def _nearest(weight: mx.array, wanted: Format) -> mx.array:
    stored = weight.astype(getattr(mx, wanted.scale_dtype)) if wanted.scale_dtype else weight
    packed, scales, *biases = mx.quantize(stored, **wanted.parts())
    return dequantize_arrays(packed, scales, biases[0] if biases else None, **wanted.parts())
