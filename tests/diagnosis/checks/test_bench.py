import pytest

from mlx_tune.diagnosis.checks import bench
from mlx_tune.measuring.interleaved_timing import Comparison
from mlx_tune.wiring import context
from mlx_tune.wiring.ledger import Ledger


def test_lazy_evaluation_is_shown_with_both_times():
    result = bench.lazy.run(size=128, operations=10)
    assert result.status == "pass", result.summary
    assert "graph built in" in result.summary
    assert "evaluated in" in result.summary
    assert result.figures["operations"] == 20
    # Building took no memory that counts beside the arrays that evaluation made.
    assert result.figures["active_bytes_after_building"] < result.figures["peak_bytes"]


@pytest.mark.cpu_only
def test_unified_memory_says_what_is_different_here():
    result = bench.unified_memory.run(size=64)
    assert result.status == "pass"
    assert "the CPU backend has one device" in result.summary
    assert result.figures["grown_bytes"] < result.figures["array_bytes"]


def test_matmul_is_measured_in_two_widths():
    result = bench.matmul.run(size=32)
    assert result.status == "pass"
    assert set(result.figures["teraflops"]) == {"float32", "bfloat16"}


def test_quantized_matmul_is_compared():
    result = bench.quantized_matmul.run(size=128, tokens=4)
    assert result.status == "pass", result.summary
    assert set(result.figures["speed_ratio"]) == {"1", "4"}
    assert result.figures["saved_share"] > 0.5


@pytest.mark.cpu_only
def test_a_checkpointed_step_needs_less():
    result = bench.checkpointed_step.run(blocks=4, width=32, rows=512)
    assert result.status == "pass", result.summary
    assert result.figures["checkpointed"]["peak_bytes"] < result.figures["plain"]["peak_bytes"]
    assert "% less" in result.summary


@pytest.mark.cpu_only
def test_without_metal_there_is_no_gain():
    result = bench.wired.run()
    assert result.status == "skip"
    assert result.summary.startswith("no gain on this machine")


@pytest.mark.parametrize(
    ("compared", "words"),
    [
        (Comparison(1.001, 0.0, 3), "no gain on this machine"),
        (Comparison(1.10, 0.2, 3), "no gain on this machine"),  # within what the turns scatter by
        (Comparison(1.5, 0.01, 3), "1.50 times as fast"),
    ],
)
def test_the_sweep_is_run_wired_and_not(metal, monkeypatch, tmp_path, compared, words):
    limits = []
    own = Ledger(tmp_path / "wired")
    monkeypatch.setattr(context, "ledger", own)

    def compare(first, second, **_):
        first()
        limits.extend(metal.limits)
        second()
        assert metal.limit == 0
        return compared

    monkeypatch.setattr(bench, "compare", compare)
    result = bench.wired.run(total_bytes=2**19, idle_seconds=0.0)
    assert result.status == "pass", result.summary
    assert words in result.summary
    assert limits == [int(4 * 2 * 256 * 256 * 1.1), 0]
    own._forget()
