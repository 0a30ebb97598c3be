from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_tune.errors import TraceError
from mlx_tune.graphs import ArraySpec, estimate_memory
from mlx_tune.graphs.tracing.recomputation import tracing
from mlx_tune.graphs.tracing.replaced_calls import ReplacedCalls, replacing_calls
from mlx_tune.graphs.tracing.standins import STAND_INS


def test_nothing_is_replaced_where_nothing_is_refused() -> None:
    logits, targets = ArraySpec((64, 512), mx.float32), ArraySpec((64,), mx.int32)
    estimate = estimate_memory(lambda x, t: nn.losses.cross_entropy(x, t).sum(), logits, targets)
    assert estimate.stand_ins == {}


def test_an_operation_without_a_stand_in_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match="operation BitwiseInvert"):
        estimate_memory(lambda x: mx.bitwise_invert(x), ArraySpec((4,), mx.int32))


def test_a_stand_in_is_used_only_where_it_was_asked_for() -> None:
    original = mx.contiguous
    with tracing(), replacing_calls(ReplacedCalls(), STAND_INS.values()):
        assert mx.contiguous is not original
        text: list[str] = []
        mx.export_to_dot(type("Writer", (), {"write": staticmethod(text.append)}), mx.contiguous(mx.zeros((2, 3)).T))
        assert "Contiguous" in "".join(text)
    assert mx.contiguous is original
