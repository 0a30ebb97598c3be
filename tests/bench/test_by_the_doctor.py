import pytest
from metal_stand_in import GIB, metal

from mlx_tune import devices
from mlx_tune.bench import by_the_doctor
from mlx_tune.bench.sizes import TOY, LeftOutError
from mlx_tune.diagnosis.check import passed, skipped
from mlx_tune.diagnosis.checks import bench, kernels
from mlx_tune.measuring.interleaved_timing import Comparison
from mlx_tune.wiring import context
from mlx_tune.wiring.ledger import Ledger

__all__ = ["metal"]

ROOM = TOY.most_bytes


def test_the_doctors_figures_are_taken_at_these_sizes():
    assert by_the_doctor.lazy_graph(TOY, ROOM)["operations"] == 2 * TOY.lazy[1]
    assert by_the_doctor.shared_array(TOY, ROOM)["array_bytes"] == 4 * TOY.shared_width**2
    step = by_the_doctor.checkpointed_step(TOY, ROOM)
    assert step["checkpointed"]["peak_bytes"] > 4 * TOY.step[1] * TOY.step[2]


@pytest.mark.cpu_only
def test_a_step_as_small_as_this_saves_with_checkpoints_on_a_processor():
    """A GPU holds whole command buffers, which are larger."""
    step = by_the_doctor.checkpointed_step(TOY, ROOM)
    assert step["checkpointed"]["peak_bytes"] < step["plain"]["peak_bytes"]


def test_so_many_shapes_of_kernels_are_tried(monkeypatch):
    seen = []

    def tried(shapes):
        seen.extend(shapes)
        return passed("fine", figures={"tried": len(shapes), "faults": []})

    monkeypatch.setattr(by_the_doctor.kernels, "quantized_kernels", type("Planted", (), {"function": tried}))
    assert by_the_doctor.right_kernels(TOY, ROOM)["tried"] == TOY.kernels
    assert tuple(seen) == kernels.SHAPES[: TOY.kernels]


@pytest.mark.cpu_only
def test_where_nothing_can_be_wired_the_sweep_is_left_out():
    with pytest.raises(LeftOutError, match="nothing to wire"):
        by_the_doctor.wired_sweep(TOY, ROOM)


@pytest.mark.parametrize(("free", "wanted"), [(64 * GIB, TOY.wired_bytes), (2**20, 2**19), (2**18, 2**17)])
def test_wired_is_at_most_half_of_what_is_free(metal, monkeypatch, free, wanted):
    given = {}

    def wired(**options):
        given.update(options)
        return skipped("seen")

    monkeypatch.setattr(devices, "free_rooms", lambda: (devices.Room(free, "planted"),))
    monkeypatch.setattr(by_the_doctor.bench, "wired", type("Planted", (), {"function": staticmethod(wired)}))
    with pytest.raises(LeftOutError, match="seen"):
        by_the_doctor.wired_sweep(TOY, ROOM)
    assert given["total_bytes"] == wanted


def test_with_nothing_free_nothing_is_wired(metal, monkeypatch):
    monkeypatch.setattr(devices, "free_rooms", lambda: (devices.Room(1000, "planted"),))
    with pytest.raises(LeftOutError, match="and 500 B are safe to take here"):
        by_the_doctor.wired_sweep(TOY, ROOM)
    assert metal.calls == []


def test_a_sweep_that_others_leave_no_room_for_is_left_out(metal, monkeypatch, tmp_path):
    own, other = Ledger(tmp_path / "wired"), Ledger(tmp_path / "wired")
    monkeypatch.setattr(context, "ledger", own)
    cap = bench.read_capacity().cap_bytes
    other.claim(cap - 2**18, cap)
    monkeypatch.setattr(bench, "compare", lambda first, second, **_: (first(), Comparison(1.0, 0.0, 3))[1])
    with pytest.raises(LeftOutError, match="not all of it could be wired"):
        by_the_doctor.wired_sweep(TOY, ROOM)
    assert max(metal.limits) <= 2**18
    own._forget(), other._forget()
