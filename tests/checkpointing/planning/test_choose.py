"""The choice from numbers, against made-up models and machines whose answer is known."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.checkpointing.planning.choose import calibrated, relaxed
from mlx_tune.checkpointing.planning.schedule import frontier, price
from mlx_tune.measuring.forecast import cheapest_fitting


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 99), st.data()
)
@settings(deadline=None, max_examples=100)
def test_the_chain_prices_what_is_known_of_the_whole_step(blocks, rest, data):
    saved, seconds = [s for s, _ in blocks], [float(t) for _, t in blocks]
    plain = rest + sum(saved)
    everything = data.draw(st.integers(0, plain))
    chain = calibrated(saved, seconds, plain, everything)
    n = len(blocks)
    assert price(chain, (False,) * n).peak_bytes <= plain
    assert price(chain, (True,) * n).peak_bytes <= everything
    if everything >= rest:  # the blocks save no more than all of them together
        assert price(chain, (False,) * n).peak_bytes == plain


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(0, 100))
@settings(deadline=None, max_examples=200)
def test_bisection_finds_the_first_choice_that_fits(floors, limit):
    floors = sorted(floors, reverse=True)
    choices = [(i,) for i in range(len(floors))]
    asked = []

    def floor(choice):
        asked.append(choice)
        return floors[choice[0]]

    expected = next((i for i, f in enumerate(floors) if f <= limit), None)
    assert cheapest_fitting(choices, floor, limit) == expected
    assert len(asked) <= 2 + len(floors).bit_length()


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=7),
    st.integers(0, 150),
)
@settings(deadline=None, max_examples=150)
def test_relaxing_never_makes_a_choice_slower_or_unfit(blocks, limit):
    saved = [b for b, _, _ in blocks]
    seconds = [float(t) for _, t, _ in blocks]
    kinds = [k for _, _, k in blocks]

    def floor(choice):
        return sum(b for b, yes in zip(saved, choice, strict=True) if not yes)

    start = tuple(True for _ in blocks)
    found = relaxed(start, kinds, seconds, floor, limit)
    assert floor(found) <= limit
    assert len(found) == len(start)
    one_fewer = [(*found[:i], False, *found[i + 1 :]) for i in range(len(found)) if found[i]]
    last = {kinds[i]: i for i in range(len(found)) if found[i]}
    assert all(floor((*found[:i], False, *found[i + 1 :])) > limit for i in last.values())
    assert bool(one_fewer) == any(found)


def test_the_estimate_overrules_the_sums():
    """Blocks whose savings the sums overrate: the bisection still ends at a choice that fits."""
    chain = calibrated([10] * 8, [1.0] * 8, 100, 20)
    choices = [s.checkpointed for s in frontier(chain)]

    def truth(choice):
        return 100 - 5 * sum(choice)

    found = choices[cheapest_fitting(choices, truth, 70)]
    best = min((c for c in product([False, True], repeat=8) if truth(c) <= 70), key=sum)
    assert sum(found) == sum(best) == 6
