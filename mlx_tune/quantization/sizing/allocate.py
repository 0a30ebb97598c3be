"""One choice for each of many layers, so that the costs' sum is least and the bytes' sum stays within a budget.

This is the multiple-choice knapsack problem. It is solved exactly: layer by layer, only sums that no other one beats
in both bytes and cost are kept, and of these only such as could still beat a first, greedy answer, by the bound that
the Lagrangian relaxation gives (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_tune.pareto import unbeaten

#: Partial sums kept after a layer. Beyond it the finest differences in bytes are dropped, always towards fewer bytes,
#: so that the budget holds and the answer is still within a hair of the best.
MOST_STATES = 200_000


def allocate(
    options: Sequence[Sequence[tuple[int, float]]], budget_bytes: int, *, most_states: int = MOST_STATES
) -> list[int] | None:
    """Choose one option for each layer.

    Args:
        options: For each layer its options, each (bytes, cost).
        budget_bytes: The limit of the chosen bytes.
        most_states: Partial sums to keep after each layer; above that, those of nearly equal bytes count as one.

    Returns:
        The place of each layer's choice in its options, of least total cost; None if even the smallest do not fit.

    Examples:
        >>> allocate([[(8, 0.0), (4, 1.0)], [(8, 0.0), (4, 3.0)]], budget_bytes=12)
        [1, 0]
    """
    import numpy as np

    if not options:
        return []
    useful = [unbeaten(layer) for layer in options]
    smallest = [min(b for b, _ in layer) for layer in options]
    if sum(smallest) > budget_bytes:
        return None
    price = _best_price(options, budget_bytes)
    best_cost = _greedy_cost(options, budget_bytes, price)
    # What the layers after i cost at least, in bytes that have a price: a bound for every budget left to them.
    priced_tail = [0.0] * (len(options) + 1)
    bytes_tail = [0] * (len(options) + 1)
    for i in range(len(options) - 1, -1, -1):
        priced_tail[i] = priced_tail[i + 1] + min(c + price * b for b, c in options[i])
        bytes_tail[i] = bytes_tail[i + 1] + smallest[i]

    sums: Any = np.zeros(1, dtype=np.int64)
    costs: Any = np.zeros(1)
    trail: list[tuple[object, Any]] = []  # for each layer: each state's choice and the state before it
    for i, places in enumerate(useful):
        sizes = np.array([options[i][k][0] for k in places], dtype=np.int64)
        prices = np.array([options[i][k][1] for k in places], dtype=np.float64)
        all_sums = (sums[:, None] + sizes).reshape(-1)
        all_costs = (costs[:, None] + prices).reshape(-1)
        left = budget_bytes - all_sums
        bound = all_costs + priced_tail[i + 1] - price * left
        alive = np.flatnonzero((left >= bytes_tail[i + 1]) & (bound <= best_cost * (1 + 1e-9) + 1e-300))
        order = alive[np.lexsort((all_costs[alive], all_sums[alive]))]
        falling = np.minimum.accumulate(all_costs[order])
        first = np.concatenate([[True], all_costs[order][1:] < falling[:-1]])
        kept = _thin(order[first], all_sums, most_states)
        sums, costs = all_sums[kept], all_costs[kept]
        trail.append((np.array(places)[kept % len(places)], kept // len(places)))

    state = int(np.argmin(costs))
    chosen = []
    for choices, parents in reversed(trail):
        chosen.append(int(choices[state]))
        state = int(parents[state])
    return chosen[::-1]


def _best_price(options: Sequence[Sequence[tuple[int, float]]], budget_bytes: int) -> float:
    """The price of a byte at which the cheapest options just fit the budget: where the bound is tightest."""

    def used(price: float) -> int:
        return sum(min(layer, key=lambda o: (o[1] + price * o[0], o[0]))[0] for layer in options)

    if used(0.0) <= budget_bytes:
        return 0.0
    low, high = 0.0, 1e-30
    while used(high) > budget_bytes and high < 1e30:
        low, high = high, high * 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) > budget_bytes else (low, middle)
    return high


def _greedy_cost(options: Sequence[Sequence[tuple[int, float]]], budget_bytes: int, price: float) -> float:
    """The cost of a good answer: the options that are cheapest at the price, then the best gains that still fit."""
    chosen = [min(layer, key=lambda o: (o[1] + price * o[0], o[0])) for layer in options]
    left = budget_bytes - sum(b for b, _ in chosen)
    if left < 0:  # the price search ended on the wrong side of a tie
        chosen = [min(layer) for layer in options]
        left = budget_bytes - sum(b for b, _ in chosen)
    while True:
        gains = [
            ((now[1] - cost) / (size - now[0]), i, (size, cost))
            for i, (layer, now) in enumerate(zip(options, chosen, strict=True))
            for size, cost in layer
            if now[0] < size <= now[0] + left and cost < now[1]
        ]
        if not gains:
            return sum(c for _, c in chosen)
        _, i, option = max(gains)
        left -= option[0] - chosen[i][0]
        chosen[i] = option


def _thin(kept: Any, sums: Any, most: int) -> Any:
    """At most `most` of the states, by rising bytes: of those that are nearly alike, the smallest."""
    import numpy as np

    if len(kept) <= most:
        return kept
    span = sums[kept[-1]] - sums[kept[0]] + 1
    bucket = (sums[kept] - sums[kept[0]]) * most // span
    last = np.concatenate([bucket[1:] != bucket[:-1], [True]])  # the cheapest of its bucket, as costs fall
    return kept[last]
