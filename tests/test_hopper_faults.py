"""The planted fault is where docs/upstream.md says that it was seen, and nowhere else."""

import mlx.core as mx
import pytest
from hopper_faults import spoiled


def product(x: mx.array, w: mx.array, scales: mx.array, *rest: object, **named: object) -> mx.array:
    return mx.zeros((*x.shape[:-1], w.shape[0]))


@pytest.mark.parametrize(
    ("bits", "group_size", "width", "rows", "wrong"),
    [
        (4, 64, 64, 2, True), (8, 64, 64, 64, True), (4, 128, 128, 8, True),
        (4, 64, 64, 1, False), (4, 64, 128, 8, False), (8, 64, 1024, 2, False), (3, 64, 64, 8, False),
    ],
)  # fmt: skip
def test_it_is_where_a_row_is_one_group(bits: int, group_size: int, width: int, rows: int, wrong: bool) -> None:
    x, parts = mx.ones((rows, width)), mx.quantize(mx.ones((16, width)), group_size, bits)
    assert mx.any(spoiled(product)(x, *parts, True, group_size, bits)).item() is wrong
    named = {"transpose": True, "group_size": group_size, "bits": bits, "mode": "affine"}
    assert mx.any(spoiled(product)(x, *parts, **named)).item() is wrong


def test_other_modes_are_right() -> None:
    packed, scales = mx.quantize(mx.ones((16, 32)), mode="mxfp8")
    assert not mx.any(spoiled(product)(mx.ones((8, 32)), packed, scales, bits=8, group_size=32, mode="mxfp8")).item()
