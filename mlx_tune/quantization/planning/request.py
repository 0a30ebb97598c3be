"""The request that a plan answers: the arguments that `quantize_model` and `plan_quantization` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_tune.quantization.formats.modes import Effort


@dataclass(frozen=True)
class Request:
    """The arguments that decide on a plan, in the order of `quantize_model`, which explains them."""

    bits: int
    group_size: int
    method: str
    mode: str
    effort: Effort
    overrides: Mapping[str, bool | Mapping[str, object]] | None
    skip: Iterable[str] | str | None
    target_bpw: float | None
    target_bytes: int | str | None
    activations: bool
    requantize: bool
    scale_dtype: mx.Dtype | str | None

    @property
    def targeted(self) -> bool:
        """True where formats are to be chosen layer by layer, so that a size is met."""
        return self.target_bpw is not None or self.target_bytes is not None
