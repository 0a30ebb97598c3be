"""The dynamic programme against every choice tried out."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.checkpointing.planning.schedule import BlockCost, Chain, fastest, frontier, price
from mlx_tune.errors import InvalidArgumentError


def timeline_peak(chain, checkpointed):
    """The peak by walking the step forward and backward, one block at a time."""
    n, held, peak = len(chain.blocks), 0, 0
    for block, yes in zip(chain.blocks, checkpointed, strict=True):
        held += 0 if yes else block.saved_bytes
    peak = chain.top_bytes + held
    for i in reversed(range(n)):
        held -= 0 if checkpointed[i] else chain.blocks[i].saved_bytes
        peak = max(peak, chain.backward_bytes[i] + held)
    return peak


def every_choice(chain):
    for checkpointed in product([False, True], repeat=len(chain.blocks)):
        seconds = sum(b.extra_seconds for b, yes in zip(chain.blocks, checkpointed, strict=True) if yes)
        yield timeline_peak(chain, checkpointed), seconds, checkpointed


# Whole seconds, so that sums compare exactly in any order.
costs = st.builds(BlockCost, st.integers(0, 50), st.integers(0, 20).map(float))


@st.composite
def chains(draw):
    blocks = draw(st.lists(costs, min_size=1, max_size=7))
    backward = draw(st.lists(st.integers(0, 80), min_size=len(blocks), max_size=len(blocks)))
    return Chain(tuple(blocks), draw(st.integers(0, 100)), tuple(backward))


@given(chains(), st.data())
@settings(deadline=None, max_examples=150)
def test_price_is_the_walked_timeline(chain, data):
    chosen = data.draw(st.lists(st.booleans(), min_size=len(chain.blocks), max_size=len(chain.blocks)))
    schedule = price(chain, chosen)
    assert schedule.peak_bytes == timeline_peak(chain, chosen)
    assert schedule.checkpointed == tuple(chosen)


@given(chains(), st.integers(0, 400))
@settings(deadline=None, max_examples=300)
def test_fastest_takes_as_little_time_as_the_best_of_all_choices(chain, limit):
    fitting = [seconds for peak, seconds, _ in every_choice(chain) if peak <= limit]
    found = fastest(chain, limit)
    if not fitting:
        assert found is None
    else:
        assert found.extra_seconds == min(fitting)
        assert timeline_peak(chain, found.checkpointed) == found.peak_bytes <= limit


@given(chains())
@settings(deadline=None, max_examples=150)
def test_frontier_is_the_set_of_choices_that_none_beats(chain):
    choices = {(peak, seconds) for peak, seconds, _ in every_choice(chain)}
    unbeaten = {
        (peak, seconds)
        for peak, seconds in choices
        if not any(p <= peak and s <= seconds and (p, s) != (peak, seconds) for p, s in choices)
    }
    found = [(s.peak_bytes, s.extra_seconds) for s in frontier(chain)]
    assert set(found) == unbeaten
    assert found == sorted(found, reverse=True)


@given(chains(), st.integers(0, 400))
@settings(deadline=None, max_examples=150)
def test_rounding_of_many_candidates_is_never_optimistic(chain, limit):
    found = fastest(chain, limit, most_pairs=2)
    if found is not None:
        assert timeline_peak(chain, found.checkpointed) <= limit
        assert found.extra_seconds >= fastest(chain, limit).extra_seconds


def test_equal_blocks_are_checkpointed_from_the_first_on():
    chain = Chain((BlockCost(10, 1.0),) * 6, top_bytes=20, backward_bytes=(25,) * 6)
    assert [s.checkpointed for s in frontier(chain)][:3] == [
        (False,) * 6,
        (True,) + (False,) * 5,
        (True,) * 2 + (False,) * 4,
    ]


def test_the_last_block_is_left_alone_where_the_top_is_no_peak():
    chain = Chain((BlockCost(10, 1.0),) * 4, top_bytes=0, backward_bytes=(15,) * 4)
    assert frontier(chain)[-1].checkpointed == (True, True, True, False)


def test_cheap_blocks_go_before_expensive_ones():
    chain = Chain((BlockCost(10, 5.0), BlockCost(10, 1.0), BlockCost(10, 5.0)), 10, (0, 0, 0))
    assert fastest(chain, 30).checkpointed == (False, True, False)


def test_a_deep_model_with_many_kinds_of_blocks_stays_quick():
    chain = Chain(tuple(BlockCost(1009 + 37 * i * i, 1.0 + (i * 7919 % 101) / 97) for i in range(96)), 0, (0,) * 96)
    everything = sum(b.saved_bytes for b in chain.blocks)
    found = fastest(chain, everything // 2)
    assert everything * 0.49 < found.peak_bytes <= everything // 2


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Chain((BlockCost(1, 1.0),), 0, ()), "backward_bytes has 0 entries for 1 blocks"),
        (lambda: Chain((BlockCost(-1, 1.0),), 0, (0,)), "Block 0 has a negative cost"),
        (lambda: Chain((BlockCost(1, float("nan")),), 0, (0,)), "Block 0 has a negative cost"),
    ],
)
def test_impossible_figures_are_refused(make, text):
    with pytest.raises(InvalidArgumentError, match=text):
        make()
