"""`estimate_memory`: what it says, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlx_tune.errors import InvalidArgumentError, TraceError
from mlx_tune.graphs import ArraySpec, MemoryEstimate, estimate_memory, is_tracing
from mlx_tune.state import Snapshot


def training(
    width: int = 32, dropout: float = 0.0
) -> tuple[nn.Module, optim.Optimizer, Callable[[mx.array], mx.array]]:
    """A small model, its optimizer and a step."""
    model = nn.Sequential(nn.Linear(16, width), nn.Dropout(dropout), nn.ReLU(), nn.Linear(width, 4))
    optimizer = optim.Adam(1e-2)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)

    def step(x: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x)
        optimizer.update(model, gradients)
        return loss

    return model, optimizer, step


def flat(tree: Any) -> list[Any]:
    from mlx.utils import tree_flatten

    return [leaf.tolist() for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def test_nothing_is_evaluated_or_allocated_for_a_step_of_400_gigabytes() -> None:
    model, optimizer, step = training()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    batch = mx.zeros((1_000_000_000, 16))
    estimate = estimate_memory(step, batch, state=(model, optimizer))
    assert estimate.floor_bytes > 400e9
    # Scalars that the step's Python makes, and nothing else.
    assert mx.get_active_memory() - before < 10_000
    assert mx.get_peak_memory() - before < 10_000


def test_arguments_may_be_shapes_at_any_depth() -> None:
    model, optimizer, step = training()
    by_shape = estimate_memory(
        lambda batch: step(batch["inputs"][0]),
        {"inputs": [ArraySpec((64, 16), mx.float32)]},
        state=(model, optimizer),
    )
    by_array = estimate_memory(step, mx.zeros((64, 16)), state=(model, optimizer))
    assert by_shape.floor_bytes == by_array.floor_bytes
    assert by_shape.by_purpose["batch"] == 64 * 16 * 4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_step_trains_afterwards_exactly_as_if_nothing_had_happened(compiled: bool, dropout: float) -> None:
    x = mx.sin(mx.arange(64 * 16)).reshape(64, 16)
    results = []
    for estimating in (False, True):
        mx.random.seed(7)
        model, optimizer, step = training(dropout=dropout)
        if compiled:
            state = [model.state, optimizer.state, mx.random.state]
            step = mx.compile(step, inputs=state, outputs=state)
        losses = []
        for _ in range(3):
            if estimating:
                estimate_memory(step, x, state=(model, optimizer))
            loss = step(x)
            mx.eval(loss, model.parameters(), optimizer.state)
            losses.append(loss.item())
        results.append((losses, flat(model.parameters()), flat(optimizer.state)))
    assert results[0] == results[1]


def test_the_parts_add_up_to_the_floor_and_the_state_is_told_apart() -> None:
    model, optimizer, step = training(width=64)
    estimate = estimate_memory(step, mx.zeros((256, 16)), state=(model, optimizer))
    parameters = sum(4 * n for n in (16 * 64, 64, 64 * 4, 4))
    assert sum(estimate.by_purpose.values()) == estimate.floor_bytes
    assert estimate.by_purpose["parameters"] == estimate.parameters_bytes == parameters
    assert estimate.optimizer_bytes == pytest.approx(2 * parameters, abs=100)
    assert estimate.by_purpose["batch"] == 256 * 16 * 4
    assert max(estimate.live_bytes) <= estimate.floor_bytes
    assert estimate.start_bytes <= estimate.floor_bytes
    assert sum(owner.nbytes for owner in estimate.peak_owners) == estimate.floor_bytes


#: New ones. SGD keeps an array for each parameter even without momentum.
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: optim.SGD(1e-3),
    "AdamW": lambda: optim.AdamW(1e-3),
    "Adafactor": lambda: optim.Adafactor(1e-3),
    "several": lambda: optim.MultiOptimizer([optim.Muon(1e-3), optim.Lion(1e-3)], [lambda name, w: w.ndim == 2]),
}


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, False) for name in OPTIMIZERS),
        ("SGD", True),
        ("AdamW", True),
        # Compiled, they have many kernels for the C++ compiler.
        pytest.param("Adafactor", True, marks=pytest.mark.slow),
        pytest.param("several", True, marks=pytest.mark.slow),
    ],
)
def test_an_optimizer_that_has_not_run_is_taken_with_its_state(name: str, compiled: bool) -> None:
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), mx.zeros((2, 64))
    mx.eval(model.parameters())
    estimates = []
    for ready in (True, False):
        optimizer = OPTIMIZERS[name]()
        if ready:
            optimizer.init(model.trainable_parameters())
        before = flat(optimizer.state)

        def step(x: mx.array, optimizer: Any = optimizer) -> mx.array:
            loss, gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x)
            optimizer.update(model, gradients)
            return loss

        if compiled:
            held = [model.state, optimizer.state]
            step = mx.compile(step, inputs=held, outputs=held)
        estimates.append(estimate_memory(step, x, state=(model, optimizer), backend="cpu"))
        assert flat(optimizer.state) == before
        mx.eval(step(x), model.parameters(), optimizer.state)
    assert estimates[1].floor_bytes == estimates[0].floor_bytes
    assert estimates[1].optimizer_bytes == estimates[0].optimizer_bytes
    assert (estimates[0].notes, len(estimates[1].notes)) == ((), 1)
    assert "The optimizer has not run yet" in str(estimates[1])


def test_tied_and_frozen_parameters_count_once_and_stay() -> None:
    model = nn.Linear(256, 256, bias=False)
    holder = {"a": model, "b": model}
    model.freeze()
    estimate = estimate_memory(lambda x: model(x).sum(), mx.zeros((1, 256)), state=holder)
    assert estimate.parameters_bytes == 256 * 256 * 4
    assert estimate.end_bytes >= 256 * 256 * 4


def test_arrays_that_the_step_captures_count_as_other_state() -> None:
    table = mx.zeros((1000, 10))
    mx.eval(table)
    estimate = estimate_memory(lambda x: (x @ table.T).sum(), mx.zeros((2, 10)))
    assert estimate.by_purpose["other state"] >= 40_000


def test_operations_that_are_not_known_are_listed() -> None:
    estimate = estimate_memory(lambda x: mx.linalg.cholesky(x, stream=mx.cpu), ArraySpec((4, 4), mx.float32))
    assert estimate.unknown_operations == {"Cholesky": 1}
    assert "Unknown operation Cholesky, 1 times" in str(estimate)


def test_arrays_left_in_a_list_are_found_and_removed() -> None:
    losses: list[mx.array] = []

    def step(x: mx.array) -> mx.array:
        losses.append(x.sum())
        return losses[-1]

    with pytest.raises(TraceError, match=r"leaves arrays outside .*losses\[0\]"):
        estimate_memory(step, mx.ones((4,)))
    assert losses == []


def test_arrays_left_in_an_attribute_are_found_and_removed() -> None:
    class Trainer:
        last = None

        def step(self, x: mx.array) -> mx.array:
            self.last = x * 2
            return self.last.sum()

    trainer = Trainer()
    with pytest.raises(TraceError, match=r"self\.last"):
        estimate_memory(trainer.step, mx.ones((4,)))
    assert "last" not in vars(trainer)


def test_a_model_that_is_not_in_the_state_is_found_and_put_back() -> None:
    model, optimizer, step = training()
    before = flat(model.parameters())
    with pytest.raises(TraceError, match="pass what holds them in state="):
        estimate_memory(step, mx.zeros((2, 16)), state=optimizer)
    assert flat(model.parameters()) == before


def test_counting_is_undone_without_complaint() -> None:
    calls = {"n": 0}

    def step(x: mx.array) -> mx.array:
        calls["n"] += 1
        return x.sum()

    estimate_memory(step, mx.ones((4,)))
    assert calls == {"n": 0}


def test_mlx_says_itself_that_shapes_do_not_match_and_the_state_stays() -> None:
    model, optimizer, step = training()
    before = flat([model.parameters(), optimizer.state])
    with pytest.raises(ValueError, match=r"matmul|addmm") as caught:
        estimate_memory(step, mx.zeros((2, 17)), state=(model, optimizer))
    assert "args[0] [2, 17] float32" in caught.value.__notes__[0]
    assert flat([model.parameters(), optimizer.state]) == before


def test_what_is_not_a_step_or_not_a_state_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="is not callable"):
        estimate_memory(3, mx.ones((4,)))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="state="):
        estimate_memory(lambda x: x, mx.ones((4,)), state=mx.ones((4,)))


def test_the_user_s_own_exception_comes_through() -> None:
    def step(x: mx.array) -> mx.array:
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        estimate_memory(step, mx.ones((4,)))
    assert not is_tracing()


@pytest.mark.parametrize("when", ["in the step", "while things are put back"])
def test_an_interrupt_leaves_everything_as_it_was(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, step = training()
    losses: list[mx.array] = []
    before = flat([model.parameters(), optimizer.state])
    restore = Snapshot.restore

    def interrupted(x: mx.array) -> mx.array:
        losses.append(step(x))
        if when == "in the step":
            signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")
        return losses[-1]

    def put_back(self: Snapshot) -> None:
        if when != "in the step":
            signal.raise_signal(signal.SIGINT)
        restore(self)

    monkeypatch.setattr(Snapshot, "restore", put_back)
    with pytest.raises(KeyboardInterrupt):
        estimate_memory(interrupted, mx.zeros((2, 16)), state=(model, optimizer))
    assert losses == []
    assert flat([model.parameters(), optimizer.state]) == before


def estimate_of_a_step() -> MemoryEstimate:
    model, optimizer, step = training(width=128)
    return estimate_memory(step, mx.zeros((512, 16)), state=(model, optimizer))


def test_the_table_names_what_eats_memory() -> None:
    text = str(estimate_of_a_step())
    lines = text.splitlines()
    assert lines[0].startswith("Floor of the step: ")
    assert any(line.startswith("parameters") for line in lines)
    assert any("[512, 128] float32" in line for line in lines)
    assert "nothing was run" in text


def test_the_dictionary_is_ready_for_json() -> None:
    estimate = estimate_of_a_step()
    assert json.loads(json.dumps(estimate.to_dict()))["floor_bytes"] == estimate.floor_bytes


@pytest.mark.parametrize("dark", [False, True])
def test_the_picture_is_written(tmp_path: Path, dark: bool) -> None:
    pytest.importorskip("matplotlib")
    figure = estimate_of_a_step().plot(tmp_path / "memory.svg", dark=dark)
    assert (tmp_path / "memory.svg").read_text().startswith("<?xml")
    assert figure.axes[0].get_xlabel() == "operations, in the order of evaluation"


def test_a_backend_that_there_is_not_is_told_the_three() -> None:
    with pytest.raises(InvalidArgumentError, match=r"backend='gpu'.*\"metal\", \"cuda\" and \"cpu\""):
        estimate_memory(lambda x: x + 1, mx.zeros(3), backend="gpu")


def test_a_gpu_s_floor_says_how_far_it_was_measured_and_a_range() -> None:
    x = mx.zeros((64, 64))
    metal = estimate_memory(lambda x: mx.sin(x) @ x, x, backend="metal")
    assert "never measured on an Apple GPU" in str(metal).replace("\n", " ")
    assert metal.to_dict()["backend"] == "metal"
    here = estimate_memory(lambda x: mx.sin(x) @ x, x)
    assert here.backend == ("cpu" if mx.default_device() == mx.Device(mx.cpu) else here.backend)
    assert not any("measured" in note for note in estimate_memory(lambda x: x + 1, x, backend="cpu").notes)


def chain(x: mx.array) -> mx.array:
    for _ in range(2000):
        x = x @ x
    return x


def test_the_peak_under_a_limit_lies_between_the_floor_and_that_without_one() -> None:
    x = mx.zeros((512, 512))  # 1 MiB
    free = estimate_memory(chain, x, backend="cuda")
    limited = estimate_memory(chain, x, backend="cuda", limit="400MB")
    assert (free.limit_bytes, limited.limit_bytes) == (None, 400_000_000)
    assert free.floor_bytes == limited.floor_bytes < limited.peak_bytes < free.peak_bytes
    assert 400_000_000 < limited.peak_bytes < 400_000_000 + 102 * (1 << 20)
    assert "under 400 MB the step peaks at up to" in str(limited).replace("\n", " ")
    assert set(free.command_buffers) == {101}
