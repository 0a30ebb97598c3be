import pytest

from mlx_tune.bench import sizes
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.memory import memory_budget


@pytest.mark.parametrize("backend", ["metal", "cuda", "cpu"])
def test_quick_is_smaller_in_everything(backend):
    quick, full = sizes.sizes_for(backend, True), sizes.sizes_for(backend, False)
    assert (quick.name, full.name) == ("quick", "full")
    for name, value in vars(full).items():
        if name != "name":
            assert vars(quick)[name] <= value, name


@pytest.mark.parametrize("name", ["toy", "quick", "full"])
def test_sizes_are_found_by_the_name_that_files_have(name):
    assert sizes.sizes_named(name, "metal").name == name


def test_a_name_that_is_none_is_refused():
    with pytest.raises(InvalidArgumentError, match="size 'huge': there are 'toy', 'quick' and 'full'"):
        sizes.sizes_named("huge", "cpu")


def test_a_section_may_take_half_of_what_is_free_and_no_more_than_its_bound(monkeypatch):
    free = memory_budget(1.0)
    assert sizes.room_bytes(sizes.TOY) == min(sizes.TOY.most_bytes, memory_budget(sizes.SHARE).bytes)
    monkeypatch.setattr("mlx_tune.memory.memory_budget", lambda share: type(free)(int(share * 1000)))
    assert sizes.room_bytes(sizes.TOY) == 500


def test_more_than_the_room_is_left_out_with_both_figures():
    sizes.require(1000, 1000)
    with pytest.raises(sizes.LeftOutError, match=r"it needs 2\.00 kB, and 1\.00 kB are safe to take here"):
        sizes.require(2000, 1000)
