"""What every layer is given, and that rounding which knows it never harms a model with large channels."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys
from mlx.utils import tree_flatten
from outlier_model import LARGE, Outliers, divergence, tokens

import mlx_tune as mt
from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.quantization import quantize as quantize_of
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.learning import importance
from mlx_tune.quantization.learning.importance import with_energies
from mlx_tune.quantization.models.batches import Batch, read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.upstream import is_lazy


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_large_channels_are_no_harm(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nearest, now = divergence(bits, "nearest"), divergence(bits, "optimal")
    monkeypatch.setattr(quantize_of, "with_energies", lambda model, plan, *_, **__: (plan, ()))
    alike = divergence(bits, "optimal")
    assert alike > nearest  # the fault that this is about: all inputs counted alike
    assert now < 0.8 * nearest


def with_energies_of(
    model: nn.Module, batches: list[Batch], **options: Any
) -> tuple[mt.QuantizationPlan, tuple[str, ...]]:
    """A plan at 4 bits with energies, and remarks."""
    return with_energies(WalkedModel(model), plan_quantization(model, 4, **options), batches, blocks=blocks_of(model))


def test_energies_are_mean_squares_of_inputs() -> None:
    model, batches = Outliers(), read_batches([tokens(1), tokens(2)], "calibration")
    plan, notes = with_energies_of(model, batches, group_size=64, skip="embed")
    assert notes == ()
    x = model.embed(mx.concatenate([tokens(1), tokens(2)])[:, :-1])
    expected = {}
    for i, block in enumerate(model.blocks):
        inner = block.norm(x.astype(mx.float32))
        hidden = nn.silu(block.up(inner))
        expected |= {f"blocks.{i}.up": inner, f"blocks.{i}.down": hidden}
        x = x.astype(mx.float32) + block.down(hidden)
    expected["head"] = model.norm(x)
    for layer in plan.layers:
        wanted = mx.square(expected[layer.path].astype(mx.float32)).mean((0, 1))
        assert layer.energy is not None
        assert mx.allclose(layer.energy, wanted, rtol=1e-2).item(), layer.path


def test_random_tokens_find_the_large_channels() -> None:
    plan, _ = with_energies_of(Outliers(), [], group_size=64)
    for layer in plan.layers:
        if layer.path.endswith("up"):
            assert layer.energy is not None
            assert set(mx.argsort(-layer.energy)[:2].tolist()) == set(LARGE)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [toys.llama, toys.qwen3_moe, toys.gemma2, toys.lfm2])
def test_every_layer_of_a_language_model_is_reached_and_nothing_changed(make: Callable[[], nn.Module]) -> None:
    model = make()
    before, state = toys.arrays_of(model), mx.random.state[0].tolist()  # type: ignore[index]
    plan, notes = with_energies_of(model, [], group_size=32)
    assert notes == ()
    for layer in plan.layers:
        if not layer.kind.endswith("Embedding") or model.get("lm_head") is None:
            assert layer.energy is not None, layer.path
            assert layer.energy.shape == (layer.shape[-1],)
    assert toys.same_arrays(before, toys.arrays_of(model))
    assert mx.random.state[0].tolist() == state  # type: ignore[index]


def test_a_lazily_loaded_model_stays_so(tmp_path: Path) -> None:
    toy = toys.llama(tied=False)
    mx.save_safetensors(str(tmp_path / "w.safetensors"), dict(tree_flatten(toy.parameters())))
    expected, _ = with_energies_of(toy, [], group_size=32)
    toy.load_weights(str(tmp_path / "w.safetensors"))
    plan, _ = with_energies_of(toy, [], group_size=32)
    large = [array for _, array in tree_flatten(toy.parameters()) if array.ndim == 2]
    assert all(is_lazy(array) for array in large)
    for layer, before in zip(plan.layers, expected.layers, strict=True):
        if before.energy is not None:
            assert mx.array_equal(layer.energy, before.energy).item()  # type: ignore[arg-type]


def test_a_model_that_looks_no_tokens_up_counts_inputs_alike_and_says_so() -> None:
    report = mt.quantize_model(nn.Sequential(nn.Linear(128, 64)), 4, 64, progress=False)
    assert any("all inputs count alike: it looks no tokens up" in note for note in report.notes)


class TwoInputs(Outliers):
    """A model that tokens alone do not run."""

    def __call__(self, tokens: mx.array, image: mx.array) -> mx.array:
        return super().__call__(tokens) + image


def test_so_does_one_that_cannot_run_on_tokens_alone() -> None:
    model = TwoInputs()
    before = toys.arrays_of(model)
    plan, notes = with_energies_of(model, [], group_size=64)
    assert all(layer.energy is None for layer in plan.layers)
    assert "TypeError" in notes[0]
    assert "calibration=[batches]" in notes[0]
    assert toys.same_arrays(before, toys.arrays_of(model))


def test_layers_that_nothing_reaches_are_named() -> None:
    model = Outliers()
    model.draft = nn.Linear(128, 64)
    report = mt.quantize_model(model, 4, 64, progress=False)
    assert "Nothing reached draft: all inputs count alike there." in report.notes


def test_calibration_is_preferred_to_random_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "_random_tokens", lambda _: pytest.fail("there is calibration"))
    assert divergence(3, "optimal", calibration=[tokens(9)]) < 0.8 * divergence(3, "nearest")


@pytest.mark.parametrize("method", ["nearest", "optimal", "gptq", "dwq"])
def test_a_quantized_model_is_gone_when_it_is_let_go(method: str) -> None:
    model = Outliers()
    gone = weakref.ref(model)
    mt.quantize_model(
        model, 4, 64, method=method, calibration=[tokens(6, rows=2)], evaluation=[tokens(5, rows=2)], progress=False
    )
    del model
    gc.collect()
    assert gone() is None
