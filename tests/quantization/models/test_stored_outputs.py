import mlx.core as mx
import pytest

from mlx_tune.errors import DiskError
from mlx_tune.quantization.models.stored_outputs import OutputStore


def test_batches_come_back_in_order_bit_for_bit():
    # more than ten, so that names in the order of text would not do
    batches = [[mx.random.normal((i + 1,)).astype(mx.bfloat16) for i in range(12)], [mx.arange(3)]]
    with OutputStore() as store:
        for arrays in batches:
            store.put(arrays)
        assert len(store) == 2
        for i, arrays in enumerate(batches):
            found = store.get(i)
            assert [a.dtype for a in found] == [a.dtype for a in arrays]
            assert all(mx.array_equal(a, b).item() for a, b in zip(found, arrays, strict=True))


def test_the_outputs_take_no_memory():
    before = mx.get_active_memory()
    with OutputStore() as store:
        store.put([mx.random.normal((256, 256))])
        assert mx.get_active_memory() - before < 4 * 256 * 256


def test_the_files_go_with_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with OutputStore() as store:
        store.put([mx.ones(2)])
        assert any(path.is_file() for path in tmp_path.rglob("*"))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_what_would_not_fit_is_known_before_it_is_written():
    with OutputStore() as store, pytest.raises(DiskError, match="TMPDIR"):
        store.reserve(2**60)
