import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt


def batches(count: int = 4, first: int = 0) -> list[mx.array]:
    return [toys.tokens(2, 17, seed=first + i) for i in range(count)]


@pytest.mark.parametrize("method", ["gptq", "dwq"])
def test_methods_that_learn(method: str) -> None:
    model = toys.llama()
    report = mt.quantize_model(model, 2, 64, method=method, calibration=batches(), progress=False)
    assert {x.method for x in report.layers} <= {"optimal", "gptq", method}
    assert report.size_after_bytes == mt.plan_quantization(toys.llama(), 2, 64).size_after_bytes
    assert mx.isfinite(model(toys.tokens())).all().item()
    if method == "gptq":
        assert "gptq" in {x.method for x in report.layers}
        assert any(x.output_error < x.optimal_output_error for x in report.layers)
        assert "of optimal's" in str(report)
    else:
        assert any(note.startswith("dwq: ") for note in report.notes)


@pytest.mark.parametrize("method", ["gptq", "dwq"])
def test_a_failure_after_it_leaves_the_model_as_it_was(method: str, monkeypatch) -> None:
    import mlx_tune.quantization.quantize as quantize

    def fail(*_):
        raise RuntimeError("late")

    monkeypatch.setattr(quantize, "_report", fail)
    model = toys.llama()
    before = toys.arrays_of(model)
    with pytest.raises(RuntimeError, match="late"):
        mt.quantize_model(model, 3, 64, method=method, calibration=batches(), progress=False)
    assert toys.same_arrays(before, toys.arrays_of(model))


def test_layers_of_other_modes_are_searched_for_on_their_own() -> None:
    model = toys.llama()
    report = mt.quantize_model(
        model, 3, 64, method="gptq", overrides={"*.o_proj": {"mode": "mxfp8"}}, calibration=batches(), progress=False
    )
    found = {x.path.rpartition(".")[2]: x for x in report.layers}
    assert found["o_proj"].mode == "mxfp8"
    assert found["o_proj"].method == "optimal"
    assert found["up_proj"].mode == "affine"


def test_dwq_by_a_given_loss() -> None:
    def loss(model: nn.Module, x: mx.array) -> mx.array:
        return mx.square(model(x) - target).mean()

    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    x = [mx.random.normal((16, 64), key=mx.random.key(i)) for i in range(4)]
    target = mx.ones((16, 32))
    report = mt.quantize_model(model, 3, 64, method="dwq", calibration=x, evaluation=x, loss=loss, progress=False)
    assert report.accuracy.loss_after < report.accuracy.loss_before


def test_requantizing_by_gptq() -> None:
    model = toys.llama()
    mt.quantize_model(model, 8, 64, method="nearest", progress=False)
    report = mt.quantize_model(model, 3, 64, method="gptq", requantize=True, calibration=batches(), progress=False)
    assert {x.bits for x in report.layers} == {3}
    assert "gptq" in {x.method for x in report.layers}
