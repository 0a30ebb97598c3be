import mlx.core as mx
import pytest

from mlx_tune.quantization.learning.kept_arrays import KeptArrays


def test_memory_is_used_up_to_its_room_and_given_back():
    with KeptArrays(room_bytes=16) as kept:
        kept["a"] = mx.arange(4)
        kept["b"] = mx.arange(4) + 1
        assert kept.on_disk_bytes == 16
        assert (kept["a"].tolist(), kept["b"].tolist()) == ([0, 1, 2, 3], [1, 2, 3, 4])
        kept["a"] = mx.zeros(2)  # in its place
        assert kept.room_bytes(on_disk=False) == 8
        kept.discard("b")
        kept.discard("b")
        assert kept.on_disk_bytes == 0
        with pytest.raises(KeyError):
            kept["b"]
        assert kept.room_bytes(on_disk=True) > 8


def test_an_array_read_before_its_file_is_forgotten_stays():
    with KeptArrays(room_bytes=0) as kept:
        kept["a"] = mx.arange(4)
        folder, array = kept._folder, kept["a"]
        kept.discard("a")
        assert array.tolist() == [0, 1, 2, 3]
    assert not folder.exists()
