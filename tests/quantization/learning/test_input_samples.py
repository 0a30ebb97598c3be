import mlx.core as mx
import numpy as np
import pytest

from mlx_tune.quantization.learning.input_samples import ROWS, InputSamples, sampled_output_error


def test_rows_are_spread_over_batches_and_over_each():
    with InputSamples(batches=4) as samples:
        for batch in range(4):
            samples.add("layer", (mx.arange(1024) + 1024 * batch)[:, None])
        rows = samples.read("layer")[:, 0].tolist()
    assert rows == list(range(0, 4096, 8))
    assert len(rows) == ROWS


def test_no_more_rows_than_there_were_and_none_of_a_layer_that_was_given_none():
    with InputSamples(batches=1) as samples:
        samples.add("layer", mx.ones((3, 5), mx.bfloat16))
        assert samples.read("layer").shape == (3, 5)
        assert samples.read("layer").dtype == mx.float32
        assert samples.reader("other")() is None


def test_more_batches_than_were_announced_add_no_rows():
    with InputSamples(batches=1) as samples:
        samples.add("layer", mx.zeros((ROWS, 1)))
        samples.add("layer", mx.ones((ROWS, 1)))
        assert samples.read("layer").shape == (ROWS, 1)
        assert samples.read("layer").max().item() == 0


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("lookups", [False, True])
def test_the_error_is_that_of_numpy(scale, lookups):
    random = np.random.default_rng(0)
    inputs, weight = random.normal(size=(20, 6)), random.normal(size=(9, 6))
    after = weight + 0.1 * random.normal(size=weight.shape)
    expected = np.square(inputs @ (weight - after).T).sum() / np.square(inputs @ weight.T).sum()
    if lookups:
        expected += np.square(weight - after).sum() / np.square(weight).sum()
    x, w, a = (mx.array((y * scale).astype(np.float32)) for y in (inputs, weight, after))
    assert sampled_output_error(x, w, lambda rows: a[rows], lookups=lookups) == pytest.approx(expected, rel=1e-4)


def test_outputs_of_zero_have_no_error():
    zeros = mx.zeros((4, 6))
    assert sampled_output_error(zeros, mx.ones((2, 6)), lambda rows: mx.zeros((2, 6))[rows], lookups=False) == 0
