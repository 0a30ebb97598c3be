import math
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.devices import computes_on_cpu
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization import methods, quantization_config
from mlx_tune.quantization.formats.modes import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlx_tune.quantization.models import transaction
from mlx_tune.upstream import is_lazy


def quiet(model: nn.Module, *args, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, *args, progress=False, **kwargs)


@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(bits, 64) for bits in AFFINE_BITS] + [(4, size) for size in AFFINE_GROUP_SIZES if size != 64],
)
def test_nearest_is_mx_quantize(bits: int, group_size: int) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(0)).astype(mx.bfloat16)
    model = nn.Sequential(nn.Linear(128, 16, bias=False))
    model.layers[0].weight = weight
    report = quiet(model, bits, group_size, method="nearest", verify_kernels=False)
    packed, scales, biases = toys.stored_by_mlx(weight, group_size, bits)
    layer = model.layers[0]
    assert all(
        mx.array_equal(a, b).item()
        for a, b in zip((layer.weight, layer.scales, layer.biases), (packed, scales, biases), strict=True)
    )
    before = np.array(weight.astype(mx.float32), dtype=np.float64)
    after = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits, stream=mx.cpu)
    error = before - np.array(after, dtype=np.float64)
    expected = 10 * math.log10((before**2).sum() / (error**2).sum())
    assert report.layers[0].snr_db == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (toys.llama, "nearest"),
        (lambda: toys.llama(tied=False), "optimal"),
        (toys.qwen3_moe, "optimal"),
        (toys.gemma2, "nearest"),
        (toys.lfm2, "optimal"),
    ],
)
def test_it_quantizes_what_the_plan_says_and_the_model_still_runs(make, method: str) -> None:
    model = make()
    plan = mt.plan_quantization(model, 4, 64, method=method)
    report = quiet(model, 4, 64, method=method)
    assert [x.path for x in report.layers] == [x.path for x in plan.layers]
    assert report.size_before_bytes == plan.size_before_bytes
    assert report.size_after_bytes == plan.size_after_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    assert all(15 < x.snr_db < 60 for x in report.layers)
    assert {x.method for x in report.layers} == {method}
    assert mx.isfinite(model(toys.tokens())).all().item()


def test_optimal_is_the_default_and_better_than_nearest() -> None:
    default, nearest = toys.llama(), toys.llama()
    ours, theirs = quiet(default, 4, 64), quiet(nearest, 4, 64, method="nearest")
    assert ours.method == "optimal"
    assert ours.size_after_bytes == theirs.size_after_bytes
    assert all(a.snr_db > b.snr_db for a, b in zip(ours.layers, theirs.layers, strict=True))


def test_tied_modules_share_packed_arrays() -> None:
    model = nn.Sequential(nn.Embedding(96, 128), nn.Linear(128, 96))
    model.layers[1].weight = model.layers[0].weight
    quiet(model, 4, 64)
    embedding, head = model.layers
    assert isinstance(embedding, nn.QuantizedEmbedding)
    assert isinstance(head, nn.QuantizedLinear)
    assert embedding.weight is head.weight
    assert embedding.scales is head.scales


def test_a_module_in_two_places_stays_one() -> None:
    layer = nn.Linear(128, 128)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    quiet(model, 4, 64)
    assert model.layers[0] is model.layers[2]
    assert isinstance(model.layers[0], nn.QuantizedLinear)


def test_bias_flags_and_the_random_stream_survive() -> None:
    model = toys.vision()
    model.head.freeze(keys="bias")
    model.wide._training = False
    bias = model.head.bias
    mx.random.seed(11)
    expected = mx.random.uniform().item()
    mx.random.seed(11)
    quiet(model, 4, 64, evaluation=[mx.ones((2, 8, 8, 3))])
    assert mx.random.uniform().item() == expected
    assert model.head.bias is bias
    assert "bias" in model.head._no_grad
    assert model.wide.training is False
    assert model.head.training is True
    assert isinstance(model.patch, nn.Conv2d)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"bits": 64, "group_size": 4}, "swapped"),
        ({"bits": 7}, "bits=7"),
        ({"group_size": 16}, "group_size=16"),
        ({"mode": "fp4"}, "mode='fp4'"),
        ({"method": "gptq"}, "method='gptq' learns from text or other inputs: pass calibration"),
        ({"method": "dwq"}, "method='dwq' learns"),
        ({"overrides": {"nothing": False}}, "no layer matches 'nothing'"),
        ({"evaluation": []}, "evaluation holds no batches"),
        ({"evaluation": [mx.zeros((3, 3))]}, "cannot be called with evaluation"),
        ({"calibration": mx.zeros((3, 3))}, "Write calibration="),
        ({"loss": 3}, "loss=3 must be a function"),
        ({"loss": lambda model, x: 0.0}, "is what the evaluation is judged by: pass evaluation="),
        (
            {"loss": lambda model: 0.0, "evaluation": [mx.ones((2, 8, 8, 3))]},
            r"loss cannot be called with evaluation\[0\]",
        ),
        ({"loss": lambda model, x: None, "evaluation": [mx.ones((2, 8, 8, 3))]}, "loss gave back a NoneType"),
        ({"method": "gptq", "calibration": [mx.zeros((3, 3))]}, r"cannot be called with calibration\[0\] \(\[3, 3\]\)"),
    ],
)
def test_bad_input_changes_nothing(arguments: dict, text: str) -> None:
    model = toys.vision()
    before = toys.arrays_of(model)
    with pytest.raises(QuantizationError, match=text):
        quiet(model, **arguments)
    assert toys.same_arrays(before, toys.arrays_of(model))
    assert type(model.head) is nn.Linear


def test_quantizing_twice_offers_requantize() -> None:
    model = toys.llama()
    quiet(model, 8, 64)
    with pytest.raises(QuantizationError, match="requantize=True"):
        quiet(model, 4, 64)
    reference = toys.llama()
    report = quiet(model, 4, 64, requantize=True, evaluation=[toys.tokens()])
    assert {x.bits for x in report.layers} == {4}
    assert report.bits_per_weight < 5
    direct = toys.llama()
    expected = quiet(direct, 4, 64)
    for ours, theirs in zip(report.layers, expected.layers, strict=True):
        assert ours.snr_db == pytest.approx(theirs.snr_db, abs=0.7)
    assert type(reference.model.embed_tokens) is nn.Embedding


def test_a_requantized_model_of_experts_keeps_its_classes() -> None:
    model = toys.qwen3_moe()
    quiet(model, 8, 64)
    kinds = [type(m) for m in model.modules()]
    quiet(model, 4, 64, requantize=True)
    assert [type(m) for m in model.modules()] == kinds
    assert mx.isfinite(model(toys.tokens())).all().item()


@pytest.mark.parametrize("fail_at", [0, 7, 14])
def test_a_failure_at_any_layer_leaves_the_model_as_it_was(monkeypatch, fail_at: int) -> None:

    model = toys.llama()
    before, kinds = toys.arrays_of(model), [type(m) for m in model.modules()]
    calls = []

    def pack(*arguments, **options):
        calls.append(1)
        if len(calls) > fail_at:
            raise MemoryError("no more")
        return real(*arguments, **options)

    real = methods.pack_weight
    monkeypatch.setattr(methods, "pack_weight", pack)
    mx.random.seed(1)
    expected = mx.random.uniform().item()
    mx.random.seed(1)
    with pytest.raises(MemoryError, match="no more"):
        quiet(model)
    assert toys.same_arrays(before, toys.arrays_of(model))
    assert [type(m) for m in model.modules()] == kinds
    assert mx.random.uniform().item() == expected


def test_so_does_one_while_evaluating(monkeypatch) -> None:
    from mlx_tune.quantization.judging.evaluation import Evaluation

    def judge(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "judge", judge)
    model = toys.llama()
    before = toys.arrays_of(model)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, evaluation=[toys.tokens()])
    assert toys.same_arrays(before, toys.arrays_of(model))


def big(width: int = 1024, layers: int = 6) -> nn.Sequential:
    mx.random.seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("method", ["nearest", "optimal"])
def test_peak_memory_is_the_model_and_its_largest_block(method: str, monkeypatch) -> None:
    monkeypatch.setattr(transaction, "room_for_originals", lambda: 0)  # where a card has room, originals stay in it
    model = big(2048, layers=4)
    start = mx.get_active_memory()
    layer = 2048 * 2048 * 2
    with mt.track_memory() as memory:
        quiet(model, 4, 64, method=method)
    # Rows are worked on in pieces, which take the same 20 MB for however large a layer. On a GPU they are larger, and
    # two rounds of the search are under way at a time: all of them took 620 MB.
    pieces = 20_000_000 if computes_on_cpu() else 300_000_000
    assert memory.peak_bytes <= start + layer + pieces
    assert memory.active_bytes < start - 2.5 * layer


def test_a_lazily_loaded_model_is_never_whole_in_memory(tmp_path) -> None:
    model = big(layers=24)
    total = 24 * 1024 * 1024 * 2
    mx.save_safetensors(str(tmp_path / "w.safetensors"), toys.arrays_of(model))
    model.load_weights(str(tmp_path / "w.safetensors"))
    start = mx.get_active_memory()
    with mt.track_memory() as memory:
        report = quiet(model, 4, 64, method="nearest")
    assert memory.active_bytes - start < 0.3 * total
    # What any layer's pieces take, and a layer. A GPU's pieces are larger than such a layer, which it takes whole.
    pieces = 12_000_000 if computes_on_cpu() else 25_000_000
    assert memory.peak_bytes - start < 0.3 * total + pieces
    assert len(report.layers) == 24


def test_a_lazily_loaded_model_stays_lazy_after_a_failure(tmp_path, monkeypatch) -> None:
    import mlx_tune.quantization.quantize as quantize

    def fail(*_):
        raise RuntimeError("late")

    model = big(layers=2)
    expected = toys.arrays_of(model)
    mx.save_safetensors(str(tmp_path / "w.safetensors"), expected)
    model.load_weights(str(tmp_path / "w.safetensors"))
    monkeypatch.setattr(quantize, "report_of", fail)
    with pytest.raises(RuntimeError, match="late"):
        quiet(model, 4, 64, method="nearest")
    assert all(is_lazy(layer.weight) for layer in model.layers)
    assert toys.same_arrays(expected, toys.arrays_of(model))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("make", [toys.llama, toys.qwen3_moe])
def test_other_modes(mode: str, make) -> None:
    model = make()
    report = quiet(model, mode=mode)
    assert {x.mode for x in report.layers} <= {mode, "affine"}
    assert report.size_after_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    assert mx.isfinite(model(toys.tokens())).all().item()
    assert quantization_config(model)["mode"] == mode


def test_importing_the_package_is_light() -> None:
    import subprocess

    code = (
        "import sys, mlx_tune.quantization;"
        "print([m for m in ('mlx_lm', 'transformers', 'rich', 'matplotlib', 'numpy', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
