"""State that differs after the first step is taken as it is then: the estimate is that of a step later on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map, tree_reduce

from mlx_tune.graphs import estimate_memory
from mlx_tune.trees import arrays_of

SCALE = 1024.0


def unscaled(gradients: Any, dtype: mx.Dtype) -> Any:
    return tree_map(lambda g: g.astype(dtype) / SCALE, gradients)


def guarded(gradients: Any) -> Any:
    fine = tree_reduce(lambda fine, g: fine & mx.all(mx.isfinite(g)), gradients, mx.array(True))
    return tree_map(lambda g: mx.where(fine, g, mx.zeros_like(g)), gradients)


#: From gradients of a scaled loss to what the optimizer gets.
GRADIENTS: dict[str, Callable[[Any], Any]] = {
    "scaled": lambda g: g,
    "unscaled as they are": lambda g: tree_map(lambda g: g / SCALE, g),
    "unscaled in float32": lambda g: unscaled(g, mx.float32),
    "unscaled and guarded": lambda g: guarded(unscaled(g, mx.float32)),
    "unscaled as they are and guarded": lambda g: guarded(tree_map(lambda g: g / SCALE, g)),
}


def training(dtype: mx.Dtype, optimizer: str, gradients: str, cast: bool) -> tuple[Any, Any]:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    chosen = {"sgd": optim.SGD(0.1), "momentum": optim.SGD(0.1, momentum=0.9), "adamw": optim.AdamW(0.1)}[optimizer]
    value_and_grad = nn.value_and_grad(model, lambda m, x: m(x).square().mean().astype(mx.float32) * SCALE)

    def step(x: mx.array) -> mx.array:
        loss, made = value_and_grad(model, x)
        chosen.update(model, GRADIENTS[gradients](made))
        if cast:
            model.set_dtype(dtype)
        return loss

    return step, (model, chosen)


@pytest.mark.parametrize("cast", [False, True], ids=["as the optimizer leaves them", "cast back"])
@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_estimate_is_that_of_the_second_step(dtype: mx.Dtype, optimizer: str, gradients: str, cast: bool) -> None:
    step, state = training(dtype, optimizer, gradients, cast)
    x = mx.ones((8, 32), dtype)
    dtypes = [(name, a.dtype) for name, a in tree_flatten(state[0].parameters())]
    before = estimate_memory(step, x, state=state)
    assert [(name, a.dtype) for name, a in tree_flatten(state[0].parameters())] == dtypes
    mx.eval(step(x), list(arrays_of(state)))
    later = estimate_memory(step, x, state=state)
    assert before.floor_bytes == pytest.approx(later.floor_bytes, abs=64)
    assert not any("second step" in note for note in later.notes)


def test_what_the_step_widens_is_said() -> None:
    step, state = training(mx.float16, "sgd", "unscaled in float32", cast=False)
    state[1].init(state[0].trainable_parameters())
    notes = estimate_memory(step, mx.ones((8, 32), mx.float16), state=state, backend="cpu").notes
    assert notes == (
        "The step makes float32 of float16 in layers.0.weight and 3 more: taken as it is from the second step on.",
    )
    step, state = training(mx.float16, "sgd", "scaled", cast=False)
    state[1].init(state[0].trainable_parameters())
    assert estimate_memory(step, mx.ones((8, 32), mx.float16), state=state, backend="cpu").notes == ()


def test_state_that_grows_wider_without_end_is_an_estimate_all_the_same() -> None:
    dtypes = [mx.uint8, mx.uint16, mx.uint32, mx.uint64]
    state = {"a": mx.zeros((1000,), mx.uint8)}
    mx.eval(state)

    def step(x: mx.array) -> mx.array:
        state["a"] = state["a"].astype(dtypes[min(3, dtypes.index(state["a"].dtype) + 1)])
        return x.sum()

    assert estimate_memory(step, mx.ones((2,)), state=state, backend="cpu").end_bytes == pytest.approx(8000, abs=64)
    assert state["a"].dtype == mx.uint8
