"""The report that a doubting user runs."""

import json
import random

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.checkpointing.verify import _compared
from mlx_tune.checkpointing.verify_report import GradientDifference, VerifyReport


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm(4)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + self.dropout(mx.tanh(self.norm(self.inner(x))))


class Unsteady(Block):
    """Draws from Python's own random numbers, which are not repeated."""

    def __call__(self, x):
        return super().__call__(x) * (1 + random.random())


def loss(model, x):
    return mx.square(model(x)).mean()


X = mx.random.normal((8, 4), key=mx.random.key(4))


def state_of(model):
    return {name: (id(array), array.tolist()) for name, array in tree_flatten(model.state)}, [
        (type(module), dict(vars(module))) for module in model.modules()
    ]


@pytest.mark.parametrize("wrap", [lambda model: None, mt.checkpoint_blocks, lambda m: mt.checkpoint(m.layers[1])])
def test_right_gradients_and_an_untouched_model(wrap):
    model = nn.Sequential(Block(), Block(), Block())
    mx.eval(model.parameters())
    wrap(model)
    model.layers[2].eval()
    mx.random.seed(6)
    before = state_of(model)
    report = mt.verify_checkpoint(model, loss, X)
    assert state_of(model) == before
    assert mx.random.state[0].tolist() == [0, 6]
    assert report.ok
    assert report.wrong == ()
    assert report.loss > 0
    assert len(report.parameters) == 12
    assert "Checkpointing changes no gradient." in str(report)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_the_blocks_it_names():
    model = nn.Sequential(Block(), Block())
    assert mt.verify_checkpoint(model, lambda x: loss(model, x), X).blocks == ("layers.0", "layers.1")
    mt.checkpoint(model.layers[1])
    assert mt.verify_checkpoint(model, loss, X).blocks == ("layers.1",)
    assert mt.verify_checkpoint(mt.checkpoint(Block()), loss, X).blocks == ("(model)",)
    many = nn.Sequential(*[Block() for _ in range(11)])
    assert mt.verify_checkpoint(many, loss, X).blocks == tuple(f"layers.{i}" for i in range(11))


def test_blocks_that_were_not_put_to_the_test_are_named():
    class Forgotten(nn.Sequential):
        def __call__(self, x):
            return self.layers[0](x)

    model = Forgotten(Block(), Block())
    report = mt.verify_checkpoint(model, loss, X)
    assert report.ok
    assert report.idle == ("layers.1",)
    assert "1 of 2 blocks did not run again, so nothing was tested there: layers.1." in str(report)
    model.eval()
    assert mt.verify_checkpoint(model, loss, X).idle == ("layers.0", "layers.1")
    assert mt.verify_checkpoint(nn.Sequential(Block(), Block()), loss, X).idle == ()


def test_functions_are_plain_too_in_the_plain_runs():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block(), Block()]

        def __call__(self, x):
            return fast(self.layers[1](self.layers[0](x)))

    fast = mt.checkpoint(lambda x: mx.sin(x) * random.random())
    assert not mt.verify_checkpoint(Functional(), loss, X).ok, "three wrong gradients in a row would agree"


def test_a_block_that_cannot_be_repeated_is_found():
    random.seed(3)
    model = nn.Sequential(Block(), Unsteady())
    state = random.getstate()
    report = mt.verify_checkpoint(model, lambda model, x: (loss(model, x), 3), X)
    assert random.getstate() == state
    assert not report.ok
    assert {p.path for p in report.wrong} >= {"layers.1.inner.weight"}
    assert "WRONG: the block does something else when it is run again" in str(report)
    assert "gradients are wrong." in str(report)


def test_gradients_that_became_zero_are_flagged():
    entry = GradientDifference("w", largest=1.0, difference=1.0, noise=0.0, tolerance=1e-6, became_zero=True)
    fine = GradientDifference("b", largest=1.0, difference=0.0, noise=0.0, tolerance=1e-6, became_zero=False)
    report = VerifyReport(("layers.0",), 2.0, 0.0, 1e-6, (entry, fine))
    assert str(report) == (
        "1 checkpointed block against none\n"
        "parameter  largest gradient  difference  allowed\n"
        "---------  ----------------  ----------  -------  -----\n"
        "w                         1           1    1e-06  ZERO\n"
        "b                         1           0    1e-06  equal\n"
        "loss 2, difference 0\n"
        "1 of 2 gradients are wrong.\n"
        "ZERO: the block uses this parameter where checkpoint() cannot see it. Pass it as an argument, or make it an "
        "attribute of the block."
    )


def scaled(factor):
    return lambda model, x: loss(model, x) * factor


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (float("nan"), "the loss is nan both ways"),
        (float("inf"), "the loss is inf both ways"),
        (0.0, "the gradient is zero both ways"),
    ],
)
def test_what_says_nothing_is_not_tested(factor, reason):
    report = mt.verify_checkpoint(nn.Sequential(Block(), Block()), scaled(factor), X)
    assert not report.ok
    assert report.verdict == "not tested"
    assert {(p.verdict, p.reason) for p in report.parameters} == {("not tested", reason)}
    assert "Nothing was put to the test" in str(report)
    assert f"Not tested, 8 of 8: {reason}: " in str(report)
    assert json.loads(json.dumps(report.to_dict()))["parameters"][0]["verdict"] == "not tested"


def test_a_model_whose_blocks_do_not_run_again_is_not_tested():
    report = mt.verify_checkpoint(nn.Sequential(Block(), Block()).eval(), loss, X)
    assert {p.reason for p in report.parameters} == {"no checkpointed block ran again"}
    assert report.verdict == "not tested"


def test_one_parameter_that_is_tested_is_enough_and_the_others_are_named():
    model = nn.Sequential(Block(), Block())
    model.layers[1].norm.weight = mx.zeros(4)  # what comes before it has no gradient by this way
    report = mt.verify_checkpoint(model, lambda model, x: (model(x) - x).sum(), X)
    assert report.ok
    assert {p.path for p in report.untested} == {"layers.1.inner.weight", "layers.1.inner.bias"}
    assert "Checkpointing changes no gradient that was put to the test." in str(report)
    assert "Not tested, 2 of 8: the gradient is zero both ways: layers.1.inner.bias, layers.1.inner.weight." in str(
        report
    )


def test_not_a_number_one_way_is_different():
    class Sometimes(Block):
        def __call__(self, x):
            return super().__call__(x) * (float("nan") if mt.is_recomputing() else 1.0)

    report = mt.verify_checkpoint(nn.Sequential(Block(), Sometimes()), loss, X)
    assert report.verdict == "different"
    assert report.wrong


class Attention(nn.Module):
    """The softmax does not notice what a key's bias adds to every score: its true gradient is zero."""

    def __init__(self, width=32):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.k2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def __call__(self, x, y):
        x = self.norm(x + mx.softmax(self.q(x) @ self.k(y).swapaxes(-1, -2) / 6, axis=-1) @ self.v(y))
        return x, y + mx.softmax(self.q(y) @ self.k2(x).swapaxes(-1, -2) / 6, axis=-1) @ x


class TwoWay(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Attention(), Attention()]

    def __call__(self, x, y):
        for layer in self.layers:
            x, y = layer(x, y)
        return x, y


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_where_the_true_gradient_is_zero_is_no_difference(dtype, seed):
    mx.random.seed(seed)
    model = TwoWay()
    model.set_dtype(dtype)

    def both(model, x, y):
        x, y = model(x, y)
        return (x * mx.sin(x)).mean() + y.square().mean()

    report = mt.verify_checkpoint(
        model, both, mx.random.normal((2, 5, 32)).astype(dtype), mx.random.normal((2, 32, 32)).astype(dtype)
    )
    assert report.ok, report
    assert {p.path for p in report.untested} <= {f"layers.{i}.{k}.bias" for i in (0, 1) for k in ("k", "k2")}
    assert all("nothing but rounding" in p.reason for p in report.untested)


def test_a_small_gradient_that_vanishes_is_not_taken_for_rounding():
    """A thousandth of the model's largest in bfloat16, less than that type's rounding, and every entry of it gone."""
    row = _compared("w", mx.full(4, 1e-3, mx.bfloat16), mx.zeros(4, mx.bfloat16), 0.0, 1e-3, 1.0, "")
    assert row.became_zero
    assert row.verdict == "different"


def test_a_failing_loss_leaves_the_model_as_it_was():
    model = nn.Sequential(Block(), Block())
    mx.eval(model.parameters())
    before = state_of(model)

    def failing(model, x):
        model(x)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        mt.verify_checkpoint(model, failing, X)
    assert state_of(model) == before
    with pytest.raises(TypeError, match="missing"):
        mt.verify_checkpoint(model, lambda a, b, c, d: 0, X)


def test_wrong_arguments():
    with pytest.raises(mt.InvalidArgumentError, match="was given int"):
        mt.verify_checkpoint(3, loss, X)
    model = nn.Sequential(Block(), Block())
    model.freeze()
    with pytest.raises(mt.InvalidArgumentError, match="no trainable parameters"):
        mt.verify_checkpoint(model, loss, X)
    with pytest.raises(mt.CheckpointError, match="no repeated block"):
        mt.verify_checkpoint(nn.Linear(4, 4), loss, X)
