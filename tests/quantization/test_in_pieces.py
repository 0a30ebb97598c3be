"""Layer by layer into a store: the arrays and the report of the way in memory, for models of many kinds."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
from quantization_toys import arrays_of, family, gemma2, lfm2, llama, qwen3_moe, same_arrays, tokens, vision

import mlx_tune as mt
from mlx_tune.quantization.build_report import LayerOutcome
from mlx_tune.quantization.in_pieces import Energies, as_planned, plan_in_pieces, quantize_in_pieces
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.request import Request


class Kept:
    """A store in memory."""

    def __init__(self) -> None:
        self.arrays: dict[str, mx.array] = {}
        self.outcomes: dict[str, LayerOutcome] = {}
        self.energies: Energies | None = None

    def write(self, name: str, array: mx.array) -> None:
        self.arrays[name] = array

    def read(self, name: str) -> mx.array:
        return self.arrays[name] + 0  # unevaluated

    def finish(self, outcome: LayerOutcome) -> None:
        self.outcomes[outcome.path] = outcome

    def remember(self, energies: Energies) -> None:
        self.energies = energies


def request(method: str = "optimal", *, bits: int = 4, requantize: bool = False) -> Request:
    return Request(bits, 32, method, "affine", "fast", None, None, None, None, False, requantize, None)


@pytest.mark.parametrize("make", [llama, gemma2, qwen3_moe, lfm2, vision, lambda: family("deepseek_v3")])
@pytest.mark.parametrize("method", ["nearest", "optimal"])
def test_a_store_gets_what_quantize_model_makes(make: Callable[[], nn.Module], method: str) -> None:
    model, reference, store = make(), make(), Kept()
    before, walked = arrays_of(model), WalkedModel(model)
    plan = plan_in_pieces(walked, request(method))
    report = quantize_in_pieces(walked, plan, store)
    expected = mt.quantize_model(reference, 4, 32, method=method, progress=False)
    assert same_arrays(store.arrays, arrays_of(reference))
    assert (report.layers, report.skipped) == (expected.layers, expected.skipped)
    assert same_arrays(arrays_of(model), before)
    with as_planned(plan):
        promised = arrays_of(model)
        assert {k: (a.shape, a.dtype) for k, a in promised.items()} == {
            k: (a.shape, a.dtype) for k, a in store.arrays.items()
        }
    assert same_arrays(arrays_of(model), before)


def calibration() -> list[mx.array]:
    return [tokens(2, 33, seed=seed) for seed in (1, 2)]


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=False), gemma2, qwen3_moe])
@pytest.mark.parametrize("method", ["optimal", "gptq"])
def test_methods_that_learn_make_the_same_and_go_on_where_they_were(make: Callable[[], nn.Module], method: str) -> None:
    reference = make()
    expected = mt.quantize_model(reference, 3, 32, method=method, calibration=calibration(), progress=False)
    whole = Kept()
    for stop in (1, 4, None):  # one that ends early goes on
        model = make()
        before, walked = arrays_of(model), WalkedModel(model)
        plan = plan_in_pieces(walked, request(method, bits=3))
        store = Stopping(stop)
        store.arrays, store.outcomes, store.energies = whole.arrays, whole.outcomes, whole.energies
        learn = read_batches(calibration(), "calibration")
        if stop is None:
            report = quantize_in_pieces(walked, plan, store, calibration=learn)
        else:
            with pytest.raises(KeyboardInterrupt):
                quantize_in_pieces(walked, plan, store, calibration=learn)
        whole.energies = store.energies
        assert same_arrays(arrays_of(model), before)
    assert same_arrays(whole.arrays, arrays_of(reference))
    assert (report.layers, report.skipped) == (expected.layers, expected.skipped)
    assert "layers were there from an earlier call" in report.notes[-1]


class Stopping(Kept):
    """Is interrupted after so many layers."""

    def __init__(self, layers: int | None) -> None:
        super().__init__()
        self.left = layers

    def finish(self, outcome: LayerOutcome) -> None:
        super().finish(outcome)
        if self.left is not None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


def test_what_is_there_is_not_done_again() -> None:
    model, store = llama(), Kept()
    walked = WalkedModel(model)
    plan = plan_in_pieces(walked, request())
    whole = quantize_in_pieces(walked, plan, store)
    store.arrays.clear()
    del store.outcomes[plan.layers[-1].path]
    again = quantize_in_pieces(walked, plan, store)
    names = {name.rpartition(".")[0] for name in store.arrays if name.endswith("scales")}
    assert names == {plan.layers[-1].path}
    assert again.layers == whole.layers
    assert f"{len(plan.layers) - 1} of {len(plan.layers)} layers were there" in again.notes[-1]


def test_packed_layers_are_packed_anew() -> None:
    model, reference, store = llama(), llama(), Kept()
    for one in (model, reference):
        nn.quantize(one, 64, 8)
    walked = WalkedModel(model)
    quantize_in_pieces(walked, plan_in_pieces(walked, request(bits=3, requantize=True)), store)
    mt.quantize_model(reference, 3, 32, requantize=True, progress=False)
    assert same_arrays(store.arrays, arrays_of(reference))


def test_weights_that_are_no_numbers_are_refused_before_anything_is_written() -> None:
    model, store = llama(), Kept()
    model.layers[1].mlp.up_proj.weight[0, 0] = mx.nan
    walked = WalkedModel(model)
    with pytest.raises(mt.QuantizationError, match="NaN or infinite weights"):
        quantize_in_pieces(walked, plan_in_pieces(walked, request()), store)
    assert (store.arrays, store.outcomes, store.energies) == ({}, {}, None)
