"""A report of a small model, made once for each file."""

from __future__ import annotations

import pytest
import quantization_toys as toys

import mlx_tune as mt


@pytest.fixture(scope="module")
def report() -> mt.QuantizationReport:
    model = toys.llama(tied=False)
    batches = [toys.tokens(seed=i) for i in range(2)]
    return mt.quantize_model(
        model, 4, 64, skip="*.1.mlp.down_proj", evaluation=batches, calibration=batches[:1], progress=False
    )
