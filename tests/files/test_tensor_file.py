"""Files of tensors that are filled in any order: MLX reads them as if it had written them at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune.files.tensor_file import _NAMES, TensorFile

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
KINDS = sorted(set(_NAMES) - {"float64"})


def values(shape: tuple[int, ...], kind: str, seed: int) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * 9).astype(getattr(mx, {"bool": "bool_"}.get(kind, kind)))


def same(a: mx.array, b: mx.array) -> bool:
    raw = [x.reshape(-1).view(mx.uint8) for x in (a, b)]
    return (a.shape, a.dtype) == (b.shape, b.dtype) and mx.array_equal(*raw).item()


@given(parts=st.lists(st.tuples(SHAPES, st.sampled_from(KINDS)), min_size=1, max_size=6), order=st.randoms())
def test_any_arrays_in_any_order(tmp_path_factory, parts: list[Any], order: Any) -> None:
    path = tmp_path_factory.mktemp("tensors") / "w.safetensors"
    arrays = {f"a{i}.weight": values(shape, kind, i) for i, (shape, kind) in enumerate(parts)}
    names = sorted(arrays)
    order.shuffle(names)
    half = len(names) // 2
    for some in (names[:half], names[half:]):  # by two processes, one after the other
        with TensorFile(path, arrays) as file:
            for name in some:
                file.write(name, arrays[name])
            file.flush()
    loaded: Any = mx.load(str(path))
    assert loaded.keys() == arrays.keys()
    assert all(same(loaded[name], array) for name, array in arrays.items())


def test_strided_values_are_written_row_by_row(tmp_path: Path) -> None:
    turned = mx.arange(6).reshape(2, 3).T
    with TensorFile(tmp_path / "w.safetensors", {"a": turned}) as file:
        file.write("a", turned)
    loaded: Any = mx.load(str(tmp_path / "w.safetensors"))
    assert mx.array_equal(loaded["a"], turned)


def test_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    with TensorFile(tmp_path / "w.safetensors", {"a": mx.zeros((2, 2))}) as file:
        with pytest.raises(ValueError, match=r"a is mlx.core.float32 \[4\]; the file has room for .* \[2, 2\]"):
            file.write("a", mx.zeros(4))
        with pytest.raises(ValueError, match=r"a is mlx.core.int32"):
            file.write("a", mx.zeros((2, 2), dtype=mx.int32))


def test_a_file_of_other_contents_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"something else")
    file = TensorFile(path, {"a": mx.zeros(1 << 20)})
    assert not file.is_whole
    assert 4_000_000 < file.missing_bytes < 5 << 20
    with file:
        assert file.is_whole
        file.write("a", mx.ones(1 << 20))
        file.flush()
    assert file.missing_bytes == 0
    assert not TensorFile(path, {"b": mx.zeros(1 << 20)}).is_whole
