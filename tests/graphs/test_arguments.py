from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.graphs import ArraySpec, estimate_memory


def test_an_array_given_twice_is_one_and_a_shape_given_twice_is_two() -> None:
    spec, array = ArraySpec((64, 64), mx.float32), mx.zeros((64, 64))
    assert estimate_memory(lambda x, y: x @ y, spec, spec).by_purpose["batch"] == 2 * 64 * 64 * 4
    assert estimate_memory(lambda x, y: x @ y, array, array).by_purpose["batch"] == 64 * 64 * 4


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((4, -8), mx.float32, r"shape=\(4, -8\)"),
        ((4.5, 8), mx.float32, r"shape=\(4\.5, 8\)"),
        (8, mx.float32, "shape=8: give the dimensions"),
        ((4, 8), "float32", "dtype='float32': give one of MLX's"),
    ],
)
def test_what_is_no_shape_or_no_dtype_is_refused(shape: Any, dtype: Any, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        ArraySpec(shape, dtype)
