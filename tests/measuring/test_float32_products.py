"""Products exact to float32 where factors are rounded to TF32: shown on the CPU with a multiplication that rounds."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune.measuring import float32_products
from mlx_tune.measuring.float32_products import matmul_float32, product_of_parts, rounds_factors


def as_tf32(x: mx.array) -> mx.array:
    """The nearest number of ten bits."""
    bits = np.array(x).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x0FFF + ((bits >> 13) & 1)) & 0xFFFFE000
    return mx.array(kept.astype(np.uint32).view(np.float32).reshape(x.shape))


def multiply_tf32(a: mx.array, b: mx.array) -> mx.array:
    return as_tf32(a) @ as_tf32(b)


def relative_error(found: mx.array, a: mx.array, b: mx.array) -> float:
    """The largest error over what rounding could explain: the product of the magnitudes."""
    x, y = (np.array(m.astype(mx.float32), dtype=np.float64) for m in (a, b))
    return float((np.abs(np.array(found, dtype=np.float64) - x @ y) / (np.abs(x) @ np.abs(y) + 1e-300)).max())


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 40), st.floats(-8, 8))
def test_three_products_of_parts_carry_twenty_bits(seed: int, rows: int, inner: int, power: float) -> None:
    keys = mx.random.split(mx.random.key(seed))
    a = mx.random.normal((rows, inner), key=keys[0]) * 10**power
    b = mx.random.normal((inner, 5), key=keys[1])
    assert relative_error(product_of_parts(a, b, multiply_tf32), a, b) < 2**-19


def test_rounded_factors_alone_carry_ten_bits() -> None:
    a, b = mx.random.normal((8, 64), key=mx.random.key(0)), mx.random.normal((64, 8), key=mx.random.key(1))
    assert relative_error(multiply_tf32(a, b), a, b) > 2**-15


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_takes_one_product(dtype: mx.Dtype) -> None:
    a, b = (mx.random.normal((32, 32), key=mx.random.key(i)).astype(dtype) for i in (0, 1))
    calls = []

    def counted(x: mx.array, y: mx.array) -> mx.array:
        calls.append(1)
        return multiply_tf32(x, y)

    assert relative_error(product_of_parts(a, b, counted), a, b) < 2**-20
    assert len(calls) == 1
    assert len([product_of_parts(a, b.astype(mx.float32), counted), *calls]) == 4  # two products more


@pytest.mark.parametrize(
    ("rounds", "said"), [(False, "to float32's precision."), (True, "ten bits on this device (TF32)")]
)
def test_the_arithmetic_is_said(monkeypatch: pytest.MonkeyPatch, rounds: bool, said: str) -> None:
    monkeypatch.setattr(float32_products, "_rounds_factors", lambda device: rounds)
    assert said in float32_products.arithmetic()


def test_it_is_the_plain_product_where_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (mx.random.normal((3, 16, 16), key=mx.random.key(i)) for i in (0, 1))
    monkeypatch.setattr(float32_products, "_rounds_factors", lambda device: False)
    assert mx.array_equal(matmul_float32(a, b), a @ b).item()
    monkeypatch.setattr(float32_products, "_rounds_factors", lambda device: True)
    assert relative_error(matmul_float32(a, b), a, b) < 2**-19


def test_infinity_stays_infinite() -> None:
    found = product_of_parts(mx.array([[float("inf"), 1.0]]), mx.ones((2, 1)), mx.matmul)
    assert not mx.isfinite(found).any().item()


@pytest.mark.cpu_only
def test_a_cpu_rounds_nothing() -> None:
    assert not rounds_factors()
