from pathlib import Path

import mlx.core as mx
import pytest

from mlx_tune.quantization.formats.lazy_arrays import read_array
from mlx_tune.upstream import is_lazy


@pytest.fixture
def loaded(tmp_path: Path) -> dict[str, mx.array]:
    a = mx.random.normal((64, 1024), key=mx.random.key(1)).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": a, "b": a + 1})
    read = mx.load(str(tmp_path / "a.safetensors"))
    assert isinstance(read, dict)
    return read


def test_a_loaded_array_is_read_without_staying_in_memory(loaded: dict[str, mx.array]) -> None:
    array = loaded["a"]
    before = mx.get_active_memory()
    values = read_array(array)
    assert mx.get_active_memory() >= before + array.nbytes
    assert is_lazy(array)
    again = read_array(array)
    assert mx.array_equal(values, again).item()
    del values, again
    mx.synchronize()  # a GPU lets go of what a kernel read when the kernel has run
    assert mx.get_active_memory() == before
    mx.eval(array)
    assert mx.array_equal(read_array(array), array).item()


def test_so_is_one_computed_from_loaded_ones(loaded: dict[str, mx.array]) -> None:
    both = mx.stack([loaded["a"], loaded["b"]])
    before = mx.get_active_memory()
    values = read_array(both)
    assert values.shape == (2, 64, 1024)
    del values
    mx.synchronize()
    assert mx.get_active_memory() == before
    assert all(is_lazy(x) for x in (both, loaded["a"], loaded["b"]))


def test_an_evaluated_array_is_shared() -> None:
    array = mx.ones((256, 256))
    mx.eval(array)
    before = mx.get_active_memory()
    values = read_array(array)
    assert mx.get_active_memory() == before
    assert not is_lazy(array)
    assert mx.array_equal(values, array).item()


def test_random_recipes_give_the_same_values_again() -> None:
    array = mx.random.normal((8, 8), key=mx.random.key(3))
    first, second = read_array(array), read_array(array)
    assert mx.array_equal(first, second).item()
    assert mx.array_equal(first, array).item()
