"""The surroundings of a step: everything besides its state that its code can reach and change.

A trace runs the step's Python once with placeholders for arrays. Anything of that which stays behind in a list, an
attribute or a global would break later code, so those places are noted before and put back after.
"""

from __future__ import annotations

import copy
import operator
import random
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import GeneratorType
from typing import Any

from mlx_tune.graphs.tracing.built_graph import made_by_operations
from mlx_tune.reach.container_notes import Note, written
from mlx_tune.reach.walk import Walk

#: How many items to note at most, the nearest first: a data set that the step can reach has millions.
MOST_ITEMS = 1_000_000

#: Where pip puts packages.
_INSTALLED = {"site-packages", "dist-packages"}
#: Packages whose objects hold what steps compute with.
_MODELS = {"mlx", "mlx_lm", "mlx_tune"}
_ITERATORS = {type(it) for it in (iter([]), iter(()), iter({}), iter(set()), iter(range(0)), reversed([]))}


class Surroundings:
    """Everything that changes when a step's code writes to it, to be put back.

    Args:
        step: The function that will be traced.
        state: Objects that it is expected to change. Their own arrays and numbers are put back elsewhere.
    """

    def __init__(self, step: Callable[..., object], state: object) -> None:
        # Objects that the state holds are part of it: what is written there is put back and no fault.
        self._state = Walk(made=True, room=MOST_ITEMS)
        self._state.add(state)
        self._walk = Walk(self._state.seen, room=self._state.room)
        self._walk.add(step, (None, "{}", "step"))
        self._walk.add_code_of(self._state.seen.values())
        self._home = _root(getattr(step, "__module__", None))
        # In-place writing gives the same object other values; a second handle keeps the old ones.
        own = set(map(id, self._state.arrays))
        found = zip(self._walk.paths, self._walk.arrays, strict=True)
        self._arrays = [(path, array, copy.copy(array)) for path, array in found if id(array) not in own]
        self._lazy = made_by_operations(array for _, array, _ in self._arrays)
        drawing = (*self._walk.generators, *self._state.generators)
        self._draws = [(generator, _draws(generator)) for generator, _ in drawing]
        self._iterators = [
            (path, it, _position(it))
            for it, path in self._walk.iterators
            if type(it) in _ITERATORS or isinstance(it, GeneratorType)
        ]

    def restore(self) -> list[str]:
        """Put everything back; return the places where arrays were left behind."""
        for note in self._state.notes:
            note.place.put(note.items)
        left: list[str] = []
        for note in self._walk.notes:
            arrays = self._arrays_left(note)
            left += arrays
            if arrays or not self._is_others(note):
                note.place.put(note.items)
        for generator, before in self._draws:
            _draw_again(generator, before)
        made = made_by_operations(array for _, array, _ in self._arrays)
        for path, array, values in self._arrays:
            if id(array) in made:
                array[...] = values
                if id(array) not in self._lazy:  # of those that were not there yet it cannot be told
                    left.append(written(path))
        return left

    def advanced(self) -> list[str]:
        """The iterators that gave something away meanwhile, which cannot be put back."""
        moved = (path for path, iterator, before in self._iterators if _position(iterator) != before)
        return list(dict.fromkeys(map(written, moved)))

    def _arrays_left(self, note: Note) -> list[str]:
        """The keys of a place that hold arrays which they did not hold before."""
        left: list[str] = []
        for key, value in _changes(note.items, note.place.get()):
            new = Walk(ChainMap(self._walk.seen, self._state.seen), made=True)
            new.add(value)
            if new.arrays:
                left.append(written((note.path, note.form, key)))
        return left

    def _is_others(self, note: Note) -> bool:
        """True for what an installed package keeps: an experiment's logger works on in its own threads."""
        root = _root(note.home)
        return root not in _MODELS and root != self._home and _is_installed(root)


def _draws(generator: Any) -> object:
    """The state of a random generator."""
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _draw_again(generator: Any, state: Any) -> None:
    """Put a random generator back to a state."""
    if hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _position(iterator: object) -> object:
    """The position of an iterator; the same only while nothing was taken from it."""
    if isinstance(iterator, GeneratorType):
        return iterator.gi_frame.f_lasti if iterator.gi_frame is not None else None
    return operator.length_hint(iterator, -1)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


@cache
def _is_installed(root: str) -> bool:
    """True where a package belongs to Python or was installed, other than what the step's author works on."""
    if root in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return not _INSTALLED.isdisjoint(Path(file).parts)


def _changes(before: Any, now: Any) -> Iterator[tuple[Any, Any]]:
    """The values that a place holds and did not hold before, with their keys."""
    if len(now) == len(before) and all(
        map(operator.is_, now.values(), before.values()) if isinstance(now, dict) else map(operator.is_, now, before)
    ):
        return
    if isinstance(now, dict):
        yield from ((key, value) for key, value in now.items() if key not in before or before[key] is not value)
        return
    known = set(map(id, before))
    yield from ((key, value) for key, value in enumerate(now) if id(value) not in known)
