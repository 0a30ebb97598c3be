import mlx.core as mx
import numpy as np
import pytest

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.models.batches import count_tokens, read_batches


def test_batches_of_tokens_and_of_arguments() -> None:
    read = read_batches([np.zeros((2, 9), dtype=np.uint16), mx.zeros((5,), dtype=mx.int32)], "evaluation")
    assert [b.tokens.shape for b in read] == [(2, 9), (1, 5)]
    assert read_batches([[3, 1, 4], [1, 5]], "evaluation")[0].tokens.tolist() == [[3, 1, 4]]
    assert count_tokens(read) == 20
    others = read_batches([mx.zeros((2, 3)), (mx.zeros((2, 3)), mx.zeros((2,), dtype=mx.int32))], "evaluation")
    assert [len(b.arguments) for b in others] == [1, 2]
    assert all(b.tokens is None for b in others)
    assert read_batches(None, "evaluation") == []


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (mx.zeros((2, 3)), r"Write evaluation=\[tokens\]"),
        (np.zeros((2, 3)), r"Write evaluation=\[tokens\]"),
        ([], "holds no batches"),
        ([mx.zeros((2, 1), dtype=mx.int32)], r"evaluation\[0\] has shape \[2, 1\]: token arrays need"),
        ([()], r"evaluation\[0\] is empty"),
        ([mx.zeros((2, 3)), None], r"evaluation\[1\] is None"),
        (["some text"], r"evaluation\[0\] is text: .*token_batches` makes tokens of text"),
        (3, "iterable of batches"),
    ],
)
def test_batches_that_cannot_be_used(batches: object, text: str) -> None:
    with pytest.raises(QuantizationError, match=text):
        read_batches(batches, "evaluation")
