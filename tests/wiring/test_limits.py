import pytest
from metal_stand_in import GIB, MetalStandIn

import mlx_tune as mt
from mlx_tune.wiring import limits


def test_what_is_cut_down_to_the_cap_says_so(metal):
    with mt.wired_limit("60GB") as wired:
        assert "60.0 GB were asked for; this machine may wire 51.5 GB" in wired.reason


@pytest.mark.parametrize(
    ("memory_gib", "recommended_gib", "cap"),
    [
        (64, 48, 48 * GIB),
        (64, 60, 48 * GIB),  # the system's limit was raised: a quarter stays
        (32, 28, 24 * GIB),
        (16, 12, 16 * GIB - 8_000_000_000),
        (8, 6, 4 * GIB),  # never more than half
    ],
)
def test_the_system_keeps_its_reserve(monkeypatch, memory_gib, recommended_gib, cap):
    MetalStandIn(memory_gib * GIB, recommended_gib * GIB).install(monkeypatch)
    with mt.wired_limit(None) as wired:
        assert wired.limit_bytes == cap


def test_a_device_that_does_not_say_its_memory_gets_no_made_up_line():
    text = limits.closeness_warning(95, limits.Capacity(cap_bytes=100, recommended_bytes=100))
    assert text is not None
    assert "sysctl" not in text
