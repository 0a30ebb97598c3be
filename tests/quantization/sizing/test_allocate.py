import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.quantization.sizing.allocate import allocate

Options = list[list[tuple[int, float]]]

LAYER = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50).map(float)), min_size=1, max_size=4)


def brute_force(options: Options, budget: int) -> float | None:
    costs = [
        sum(cost for _, cost in combination)
        for combination in itertools.product(*options)
        if sum(size for size, _ in combination) <= budget
    ]
    return min(costs, default=None)


def cost_of(options: Options, chosen: list[int]) -> float:
    return sum(layer[k][1] for layer, k in zip(options, chosen, strict=True))


def size_of(options: Options, chosen: list[int]) -> int:
    return sum(layer[k][0] for layer, k in zip(options, chosen, strict=True))


@settings(max_examples=150, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=5), st.integers(0, 160))
def test_it_is_the_best_of_all(options: Options, budget: int) -> None:
    found, expected = allocate(options, budget), brute_force(options, budget)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert size_of(options, found) <= budget
    assert cost_of(options, found) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=5), st.integers(0, 160))
def test_thinned_out_it_still_keeps_the_budget(options: Options, budget: int) -> None:
    found = allocate(options, budget, most_states=3)
    if brute_force(options, budget) is None:
        assert found is None
    else:
        assert size_of(options, found) <= budget


def test_nothing_to_choose() -> None:
    assert allocate([], 0) == []
    assert allocate([[(5, 1.0)]], 4) is None
    assert allocate([[(5, 1.0)]], 5) == [0]


def test_room_for_everything_takes_the_cheapest() -> None:
    assert allocate([[(9, 0.5), (3, 2.0), (5, 0.5)]] * 3, 100) == [2, 2, 2]


def test_hundreds_of_layers() -> None:
    shapes = [(4096 * 4096 * (1 + i % 3), 1.0 + (i * 37 % 11)) for i in range(400)]
    options = [
        [
            (n * bits // 8 + n // group * 4, weight * 4.0**-bits * (1 + group / 256))
            for bits in (2, 3, 4, 5, 6, 8)
            for group in (32, 64, 128)
        ]
        for n, weight in shapes
    ]
    budget = sum(n * 9 // 16 for n, _ in shapes)
    chosen = allocate(options, budget)
    assert size_of(options, chosen) <= budget
    assert size_of(options, chosen) > 0.995 * budget
    uniform = sum(layer[7][1] for layer in options)  # 4 bits, groups of 64: 4.5 bits per weight
    assert cost_of(options, chosen) < uniform
