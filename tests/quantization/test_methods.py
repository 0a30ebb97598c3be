import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys
from outlier_model import VOCABULARY, Outliers, tokens

import mlx_tune as mt


def batches(count: int = 4, first: int = 0) -> list[mx.array]:
    return [toys.tokens(2, 17, seed=first + i) for i in range(count)]


@pytest.mark.parametrize("method", ["gptq", "dwq"])
def test_methods_that_learn(method: str) -> None:
    model = toys.llama()
    report = mt.quantize_model(model, 2, 64, method=method, calibration=batches(), progress=False)
    assert {x.method for x in report.layers} <= {"nearest", "optimal", "gptq", method}  # what measured no gain stays
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

    monkeypatch.setattr(quantize, "report_of", fail)
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


class Named(nn.Module):
    """Called by name, with an argument that is no array."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 64)

    def __call__(self, *, x: mx.array, scale: float) -> mx.array:
        return self.down(nn.relu(self.up(scale * x)))


def named() -> Named:
    mx.random.seed(0)
    model = Named()
    mx.eval(model.parameters())
    return model


def dictionaries(first: int = 0) -> list[dict[str, object]]:
    return [{"x": mx.random.normal((16, 64), key=mx.random.key(first + i)), "scale": 2.0} for i in range(4)]


@pytest.mark.parametrize(
    "arguments",
    [{"method": "optimal"}, {"method": "gptq"}, {"method": "dwq"}, {"target_bpw": 6.0}],
    ids=lambda arguments: str(*arguments.values()),
)
@pytest.mark.parametrize("by_loss", [False, True])
def test_batches_may_be_dictionaries(arguments: dict, by_loss: bool) -> None:
    def loss(model: nn.Module, *, x: mx.array, scale: float) -> mx.array:
        return mx.square(model(x=x, scale=scale)).mean()

    report = mt.quantize_model(
        named(), 3, 64, **arguments, calibration=dictionaries(), evaluation=dictionaries(9), progress=False,
        **({"loss": loss} if by_loss else {}),
    )  # fmt: skip
    assert report.accuracy is not None
    assert mt.plan_quantization(named(), 3, 64, calibration=dictionaries()).layers


def test_a_dictionary_is_judged_as_the_same_arguments_in_order_are() -> None:
    by_name = mt.quantize_model(named(), 3, 64, evaluation=dictionaries(), progress=False)
    in_order = nn.Sequential(lambda x: 2.0 * x, named().up, nn.ReLU(), named().down)
    report = mt.quantize_model(in_order, 3, 64, evaluation=[batch["x"] for batch in dictionaries()], progress=False)
    assert by_name.accuracy.relative_error == pytest.approx(report.accuracy.relative_error, rel=1e-5)


def test_dictionaries_that_do_not_fit_are_named() -> None:
    with pytest.raises(mt.QuantizationError, match=r"cannot be called with evaluation\[0\] \(y=\[2, 64\]\)"):
        mt.quantize_model(named(), 3, 64, evaluation=[{"y": mx.zeros((2, 64))}], progress=False)
    for empty in ({}, {1: mx.zeros((2, 64))}):
        with pytest.raises(mt.QuantizationError, match=r"evaluation\[0\] is a dictionary of no arguments by name"):
            mt.quantize_model(named(), 3, 64, evaluation=[empty], progress=False)


def test_dwq_names_the_layers_that_kept_another_methods_scales() -> None:
    mx.random.seed(1)
    model = named()
    report = mt.quantize_model(model, 2, 64, method="dwq", calibration=dictionaries(), progress=False)
    methods = {layer.path: layer.method for layer in report.layers}
    kept = [path for path, method in methods.items() if method != "dwq"]
    assert "unused" in kept
    assert "dwq" in methods.values()
    note = next(note for note in report.notes if note.startswith("dwq kept another method's scales"))
    assert f"in {len(kept)} of 3 layers" in note
    assert all(path in note for path in kept)


class Averaging(nn.Module):
    """Layers whose inputs all but move together: outputs then depend on the sums of a row's errors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 128)
        self.embed.weight = 1 + 0.01 * self.embed.weight
        self.layers = [nn.Linear(128, 2, bias=False) for _ in range(16)]

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        return sum(layer(x) for layer in self.layers)  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_calibration_no_layer_s_outputs_are_worse_than_rounded_ones(bits: int) -> None:
    mx.random.seed(0)
    batches = [tokens(1), tokens(2)]
    plain, ours, theirs = Averaging(), Averaging(), Averaging()
    for model in (ours, theirs):
        model.update(plain.parameters())
    report = mt.quantize_model(ours, bits, 64, calibration=batches, progress=False)
    mt.quantize_model(theirs, bits, 64, method="nearest", progress=False)
    x = plain.embed(mx.concatenate(batches)[:, :-1])

    def error(layer: nn.Module, before: nn.Module) -> float:
        return (mx.square(layer(x) - before(x)).sum() / mx.square(before(x)).sum()).item()  # type: ignore[no-any-return]

    rows = {row.path: row for row in report.layers}
    for i, (a, b, before) in enumerate(zip(ours.layers, theirs.layers, plain.layers, strict=True)):
        row = rows[f"layers.{i}"]
        assert error(a, before) <= error(b, before) * 1.02
        assert row.output_error == pytest.approx(error(a, before), rel=0.05)
        assert (row.method == "nearest") == ("kept 'nearest'" in (row.reason or ""))
        assert row.output_error <= row.optimal_output_error  # type: ignore[operator]
    if bits >= 4:  # the search was the better one for some layers only, so that both ways were gone
        assert {"nearest", "optimal"} == {rows[f"layers.{i}"].method for i in range(16)}


def test_without_calibration_outputs_are_not_known() -> None:
    report = mt.quantize_model(Outliers(), 4, 64, progress=False)
    assert {row.output_error for row in report.layers} == {None}
    assert {row.method for row in report.layers} == {"optimal"}
