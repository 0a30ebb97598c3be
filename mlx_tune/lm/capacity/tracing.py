"""The course of a step's memory, by classes of operations: the one place where steps of unloaded models are traced."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from mlx_tune.devices import Backend
from mlx_tune.graphs.backends import rules_of
from mlx_tune.graphs.estimate import follow_step
from mlx_tune.lm.capacity.depth import START, Course


def course_of(
    step: Callable[..., object],
    args: tuple[object, ...],
    state: object,
    backend: Backend,
    *,
    state_first: bool = False,
) -> Course:
    """Trace a step and sort its operations into classes.

    Args:
        step: As `estimate_memory` takes it.
        args: Its arguments.
        state: Objects that it changes.
        backend: The backend that it is priced for.
        state_first: As for `estimate_memory`.
    """
    graph, timeline = follow_step(step, args, state, rules_of(backend), state_first=state_first)
    highest: dict[Hashable, int] = {START: timeline.start_bytes}
    for index, live in zip(timeline.order, timeline.live, strict=True):
        node = graph.nodes[index]
        made = tuple((graph.values[i].shape, graph.values[i].dtype.size) for i in node.outputs)
        key = (node.name, made)
        highest[key] = max(live, highest.get(key, 0))
    return Course(highest)
