import mlx.core as mx
import pytest

from mlx_tune.quantization.models.random_stream import same_random_stream


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 + 11])
@pytest.mark.parametrize("draws", [0, 1, 5])
def test_draws_in_the_block_do_not_show_after_it(seed, draws):
    mx.random.seed(seed)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(seed)
    with same_random_stream():
        for _ in range(draws):
            mx.random.normal((3,))
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def draw_and_fail():
    mx.random.seed(99)
    raise KeyError


def test_nor_does_an_error():
    mx.random.seed(1)
    expected = mx.random.uniform().item()
    mx.random.seed(1)
    with pytest.raises(KeyError), same_random_stream():
        draw_and_fail()
    assert mx.random.uniform().item() == expected
