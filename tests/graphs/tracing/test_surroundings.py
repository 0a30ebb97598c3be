"""What a traced step leaves behind in the code around it: found, named and put back."""

from __future__ import annotations

import argparse
import collections
import importlib
import itertools
import random
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_tune.graphs.tracing.surroundings as surroundings
from mlx_tune.errors import TraceError
from mlx_tune.graphs import estimate_memory

X = mx.ones((4, 4))
mx.eval(X)

history: list[mx.array] = []
count = 0
latest = None


class Slotted:
    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = None


class Counted:
    total: Any = 0

    def step(self, x: mx.array) -> mx.array:
        type(self).total = x.sum()
        return self.total


class Helped:
    def helper(self, x: mx.array) -> None:
        history.append(x.mean())

    def __call__(self, x: mx.array) -> mx.array:
        self.helper(x)
        return x.sum()


def writes_to_a_global(x: mx.array) -> mx.array:
    global latest
    latest = x.sum()
    return latest


def writes_to_a_new_global(x: mx.array) -> mx.array:
    global never_seen_before
    never_seen_before = x.sum()
    return x.sum()


def writes_from_a_function_inside(x: mx.array) -> Any:
    def loss(x: mx.array) -> mx.array:
        history.append(x.sum())
        return x.mean()

    return mx.value_and_grad(loss)(x)


def writes_to_a_default(x: mx.array, seen: list[mx.array] = []) -> mx.array:  # noqa: B006
    seen.append(x.sum())
    return x.sum()


def writes_to_itself(x: mx.array) -> mx.array:
    writes_to_itself.last = x.sum()  # type: ignore[attr-defined]
    return x.sum()


def writer(write: Callable[[mx.array], Any]) -> Callable[[mx.array], mx.array]:
    """A step that writes something that it closes over."""

    def step(x: mx.array) -> mx.array:
        write(x.sum())
        return x.mean()

    return step


def cases() -> dict[str, tuple[Callable[..., Any], str, Callable[[], Any]]]:
    """A step, the place that its error names, and what that place holds."""
    window: collections.deque[mx.array] = collections.deque(maxlen=2)
    groups: dict[str, list[mx.array]] = collections.defaultdict(list)
    slotted, namespace, options = Slotted(), types.SimpleNamespace(), argparse.Namespace()
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(12):
        inner["in"] = {}
        inner = inner["in"]
    array, in_a_dict = mx.zeros((4,)), {"a": mx.zeros((2, 1))}
    mx.eval(array, in_a_dict)
    bound: list[mx.array] = []

    def in_place(x: mx.array) -> mx.array:
        array[1] = x.sum()
        return array.sum()

    def in_place_below(x: mx.array) -> mx.array:
        in_a_dict["a"] += x.sum()
        return x.sum()

    def partly(bound: list[mx.array], x: mx.array) -> mx.array:
        bound.append(x)
        return x

    return {
        "deque": (writer(window.append), r"write\[0\]", lambda: list(window)),
        "defaultdict": (writer(lambda y: groups["a"].append(y)), r"groups\['a'\]", lambda: dict(groups)),
        "slots": (writer(lambda y: setattr(slotted, "last", y)), r"slotted\.last", lambda: slotted.last),
        "namespace": (writer(lambda y: setattr(namespace, "y", y)), r"namespace\.y", lambda: vars(namespace)),
        "options": (writer(lambda y: setattr(options, "y", y)), r"options\.y", lambda: vars(options)),
        "deep": (writer(lambda y: inner.update(y=y)), r"inner\['y'\]", lambda: inner),
        "class": (Counted().step, r"Counted\.total", lambda: Counted.total),
        "global": (writes_to_a_global, "latest", lambda: latest),
        "new global": (writes_to_a_new_global, "never_seen_before", lambda: "never_seen_before" in globals()),
        "function inside": (writes_from_a_function_inside, r"history\[0\]", lambda: history),
        "method that the step calls": (Helped(), r"history\[0\]", lambda: history),
        "default": (writes_to_a_default, r"step's default 0\[0\]", lambda: writes_to_a_default.__defaults__),
        "function attribute": (writes_to_itself, r"writes_to_itself\.last", lambda: vars(writes_to_itself)),
        "partial": (partial(partly, bound), r"step\.args\[0\]\[0\]", lambda: bound),
        "compiled": (mx.compile(writer(window.append)), r"\[0\]", lambda: list(window)),
        "array written in place": (in_place, "array", lambda: array.tolist()),
        "array in a dictionary written in place": (
            in_place_below,
            r"in_a_dict\['a'\]",
            lambda: in_a_dict["a"].tolist(),
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_arrays_that_stay_behind_are_named_and_taken_out(name: str) -> None:
    step, place, held = cases()[name]
    before = repr(held())
    with pytest.raises(TraceError, match=rf"leaves arrays outside of what it was said to change: .*({place})"):
        estimate_memory(step, X)
    assert repr(held()) == before


def test_what_is_counted_is_put_back_without_complaint() -> None:
    members: set[int] = set()
    counter: collections.Counter[str] = collections.Counter()

    def step(x: mx.array) -> mx.array:
        global count
        count += 1
        members.add(count)
        counter["steps"] += 1
        return x.sum()

    estimate_memory(step, X)
    assert (count, members, counter) == (0, set(), {})


def test_random_generators_are_where_they_were() -> None:
    python, numpy, old = random.Random(0), np.random.default_rng(0), np.random.RandomState(0)

    def step(x: mx.array) -> mx.array:
        return x * (python.random() + numpy.normal() + old.normal() + random.random() + np.random.rand())

    expected = []
    for estimating in (False, True):
        python.seed(1), old.seed(1), random.seed(1), np.random.seed(1)
        numpy = np.random.default_rng(1)
        if estimating:
            estimate_memory(step, X)
        expected.append(step(X).tolist())
    assert expected[0] == expected[1]


def numbers() -> Iterator[int]:
    yield from (1, 2, 3)


@pytest.mark.parametrize(
    "make", [numbers, lambda: iter([1, 2, 3]), lambda: enumerate([1, 2, 3]), lambda: zip([1, 2], [3, 4], strict=True)]
)
def test_a_step_that_takes_from_an_iterator_is_refused(make: Callable[[], Iterator[Any]]) -> None:
    batches = make()

    def step(x: mx.array) -> mx.array:
        next(batches)
        return x.sum()

    with pytest.raises(TraceError, match=r"takes from an iterator, batches.*, and .*pass it as an argument"):
        estimate_memory(step, X)


def test_an_iterator_that_is_only_in_reach_does_not_matter() -> None:
    batches, untouched = numbers(), itertools.count()

    def step(x: mx.array) -> mx.array:
        return x.sum() if (batches, untouched) else x

    estimate_memory(step, X)
    assert next(batches) == 1


def test_a_data_set_in_reach_is_not_walked_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "MOST_ITEMS", 1000)
    rows = [[[i] for i in range(50)] for _ in range(500)]
    losses: list[mx.array] = []

    def step(x: mx.array) -> mx.array:
        losses.append(x.sum() * len(rows))
        return losses[-1]

    seen = surroundings.Surroundings(step, ())
    assert len(seen._walk.notes) < 1000
    seen.restore()
    with pytest.raises(TraceError, match=r"losses\[0\]"):
        estimate_memory(step, X)
    assert losses == []


def test_what_is_too_large_to_note_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "MOST_ITEMS", 1000)
    a_data_set, losses = list(range(2000)), list[mx.array]()

    def step(x: mx.array) -> mx.array:
        losses.append(x.sum() * len(a_data_set))
        return losses[-1]

    with pytest.raises(TraceError, match=r"losses\[0\]"):
        estimate_memory(step, X)
    assert losses == []


def test_what_an_installed_package_keeps_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "a_logger.py").write_text(
        "class Run:\n"
        "    def __init__(self):\n"
        "        self.lines = []\n"
        "    def log(self, value):\n"
        "        self.lines.append(value)\n"
        "    def step(self, x):\n"
        "        self.log(x.sum())\n"
        "        return x.mean()\n"
    )
    monkeypatch.syspath_prepend(folder)
    run = importlib.import_module("a_logger").Run()

    def step(x: mx.array) -> mx.array:
        run.log("a step")
        return x.sum()

    estimate_memory(step, X)
    assert run.lines == ["a step"]  # as it may be on its way to a server already
    with pytest.raises(TraceError, match=r"self\.lines\[1\]"):
        estimate_memory(run.step, X)  # the package's own step is another matter
    assert run.lines == ["a step"]


def test_arrays_written_in_place_in_the_state_are_updates() -> None:
    state = {"mean": mx.zeros((256, 256))}
    mx.eval(state)

    def step(x: mx.array) -> mx.array:
        state["mean"] *= 0.9
        state["mean"] += x * 0.1
        return x.sum()

    batch = mx.ones((256, 256))
    mx.eval(batch)
    estimate = estimate_memory(step, batch, state=state)
    assert state["mean"].tolist() == mx.zeros((256, 256)).tolist()
    assert "Multiply" in estimate.operations
    # The batch and the mean are there before and after; x * 0.1 is held meanwhile.
    assert estimate.start_bytes == pytest.approx(2 * batch.nbytes, abs=100)
    assert estimate.end_bytes == pytest.approx(2 * batch.nbytes, abs=100)
    assert estimate.floor_bytes == pytest.approx(3 * batch.nbytes, abs=100)
