"""The three backends' constants, and which of them count for a machine."""

from __future__ import annotations

import backends as measured
import pytest
from workloads import WORKLOADS

import mlx_tune.graphs.backends as backends
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.graphs import estimate_memory
from mlx_tune.graphs.backends import CommandRule, rounded, rules_of


def test_a_name_that_is_no_backend_is_told_the_three() -> None:
    with pytest.raises(InvalidArgumentError, match=r"backend='rocm'.*\"metal\", \"cuda\" and \"cpu\""):
        rules_of("rocm")


@pytest.mark.parametrize(
    ("capability", "rule"),
    [
        ((8, 0), CommandRule(20, 400)),
        ((8, 6), CommandRule(20, 100)),
        ((9, 0), CommandRule(100, 1000)),
        ((12, 1), CommandRule(20, 25)),
    ],
)
def test_a_gpu_of_this_machine_has_the_rules_of_its_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], rule: CommandRule
) -> None:
    info = dict(zip(("compute_capability_major", "compute_capability_minor"), capability, strict=True))
    monkeypatch.setattr(backends, "backend_here", lambda: "cuda")
    monkeypatch.setattr(backends, "device_info", lambda: info)
    assert rules_of("cuda").command == rule


@pytest.mark.parametrize(("architecture", "operations"), [("applegpu_g16p", 20), ("applegpu_g13g", 40), ("x_s", 50)])
def test_so_has_an_apple_chip(monkeypatch: pytest.MonkeyPatch, architecture: str, operations: int) -> None:
    monkeypatch.setattr(backends, "backend_here", lambda: "metal")
    monkeypatch.setattr(backends, "device_info", lambda: {"architecture": architecture})
    assert rules_of("metal").command.operations == operations
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "9")
    assert rules_of("metal").command == CommandRule(7, 9, distinct=True)
    # The environment of this machine says nothing of another's.
    assert rules_of("cuda").command.operations == 100


def test_what_is_priced_for_another_machine_says_for_which() -> None:
    assert rules_of("cuda").device == "a GPU of compute capability 9.0"
    assert "never measured on an Apple GPU" in rules_of("metal").measured


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("cpu", {0: 0, 5: 5, 20_000: 20_000}),
        ("cuda", {0: 0, 1: 8, 8: 8, 9: 16, 8193: 16384, 16383: 16384, 16384: 16384, 16385: 32768}),
        ("metal", {0: 0, 1: 1, 16384: 16384, 16385: 32768}),
    ],
)
def test_allocations_are_rounded_as_the_allocators_do(backend: str, sizes: dict[int, int]) -> None:
    assert {nbytes: rounded(rules_of(backend), nbytes) for nbytes in sizes} == sizes


@pytest.mark.parametrize("name", ["1B x1 checkpointed", "1B x8", "1B LoRA x8", "1B adamw x4 checkpointed"])
def test_steps_that_an_h200_measured_are_priced_on_any_machine(name: str) -> None:
    """Real sizes, of which nothing is evaluated; every step is in docs/measurements/gpu.md."""
    truth = measured.STEPS[name][-1]
    assert measured.priced(name, "cuda").floor_bytes == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize(
    "name", ["gpt_oss-f32-adamw", "deepseek_v3-f32-adamw", "granitemoehybrid-f32-adamw", "laguna-f32-adamw-compiled"]
)
def test_sinks_experts_and_states_are_priced_for_every_backend(name: str) -> None:
    workload = WORKLOADS[name]()
    batch = workload.make_batch(workload.batch_size)
    found = {
        b: estimate_memory(workload.step, batch, state=workload.state, backend=b) for b in ("metal", "cuda", "cpu")
    }
    assert all(set(estimate.unknown_operations) <= {"Convolution"} for estimate in found.values())
    # State and batch are the same everywhere, but for the rounding of each array.
    arrays = len(found["cpu"].live_bytes)
    assert abs(found["cuda"].start_bytes - found["cpu"].start_bytes) < arrays * backends.PAGE
    assert all(e.start_bytes < e.floor_bytes <= e.peak_bytes for e in found.values())
    assert found["cuda"].floor_bytes > found["cpu"].floor_bytes / 2
