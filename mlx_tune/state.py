"""Putting back what a step changes: models, optimizers, random streams, training flags.

A measured or traced step must leave no mark (a call leaves the model, the optimizer, the random state as
they were). A snapshot walks everything that is reachable from the given state and puts it back *in place*: the
same dictionaries and lists, so that compiled steps which captured them stay bound.
"""

from __future__ import annotations

import copy
import os
import random
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.files.scratch import ScratchFiles
from mlx_tune.interrupts import uninterrupted
from mlx_tune.trees import arrays_of, containers_of, outermost, state_arrays
from mlx_tune.upstream import has_mode, random_key, set_mode

if TYPE_CHECKING:
    import mlx.nn as nn


class _Spilled:
    """Stands in a saved container for an array that lies on disk."""

    def __init__(self, name: str) -> None:
        self.name = name


class Snapshot:
    """The contents of `state` now, to be put back any number of times.

    Kept: every array, number and object reachable through modules, optimizers, dictionaries, lists and tuples;
    modules' training flags and frozen sets; `mx.random`'s stream, and Python's and NumPy's global ones.

    Args:
        state: A model, an optimizer, `mx.random.state`, or any nesting of dictionaries, lists and tuples of them.
        spill: Write the arrays that training changes (trainable parameters, an optimizer's arrays, loose arrays)
            to a file instead of keeping them, so that no second copy of them is held while trials run. Frozen
            parameters are kept by reference: as long as nothing changes them that costs nothing.
        folder: Where the file goes; the system's temporary folder by default.

    Raises:
        InvalidArgumentError: The state holds nothing that could be kept.
        DiskError: Too little free disk for what has to be spilled, or it cannot be written.

    Examples:
        >>> import mlx.nn as nn
        >>> model = nn.Linear(2, 2)
        >>> before = model.weight.tolist()
        >>> with Snapshot(model):
        ...     model.weight = model.weight * 0
        >>> model.weight.tolist() == before
        True
    """

    def __init__(self, state: object, *, spill: bool = False, folder: str | os.PathLike[str] | None = None) -> None:
        """Walk the state and note everything in it."""
        self._scratch = ScratchFiles("What trials put aside", name="state", folder=folder)
        self._file: Path | None = None
        self._saved: list[tuple[dict[object, object] | list[object], object]] = []  # a container and its items
        self._random = _RandomStreams()
        to_disk: dict[str, object] = {}
        spilled_ids = _changing_arrays(state) if spill else {}
        for container in _containers(state):
            keep = partial(_kept, spilled_ids=spilled_ids, to_disk=to_disk)
            if isinstance(container, dict):
                self._saved.append((container, {name: keep(value) for name, value in container.items()}))
            else:
                self._saved.append((container, [keep(value) for value in container]))
        if to_disk:
            with uninterrupted():
                try:
                    self._file = self._scratch.save(to_disk)
                finally:
                    to_disk.clear()  # whatever still refers to this dictionary must not hold the arrays
                # An interrupt may come before anybody holds this snapshot.
                weakref.finalize(self, self._scratch.close)

    def restore(self) -> None:
        """Put everything back. May be called again after further changes.

        The array that trials left in the place of a spilled one is let go before that one is read, one after the
        other, so the two never take memory at the same time. A Ctrl-C meanwhile waits until everything is back.
        """
        with uninterrupted():
            on_disk = self._open()
            if on_disk:
                for container, items in self._saved:
                    _let_go(container, items)
            loaded: dict[str, object] = {}
            copies: dict[int, object] = {}
            for container, items in self._saved:
                _put_back(container, items, on_disk, loaded, copies)
            loaded.clear()
            copies.clear()
            self._random.restore()

    def discard(self) -> None:
        """Delete the spilled file and let go of everything kept."""
        self._saved.clear()
        self._scratch.close()
        self._file = None

    def __enter__(self) -> Snapshot:
        """Return the snapshot: the state was noted when it was made."""
        return self

    def __exit__(self, *_: object) -> None:
        """Restore, then let go. A Ctrl-C waits until that is done."""
        with uninterrupted():
            try:
                self.restore()
            finally:
                self.discard()

    def _open(self) -> dict[str, object]:
        """The spilled arrays, not read yet; raises before anything is touched if the file is gone."""
        if self._file is None:
            return {}
        import mlx.core as mx

        arrays: dict[str, object] = mx.load(str(self._file))  # type: ignore[assignment]
        return arrays


class _RandomStreams:
    """MLX's stream of this thread, and Python's and NumPy's global ones."""

    def __init__(self) -> None:
        self._key = _key_words()
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def restore(self) -> None:
        _put_key(self._key)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def same_random_stream() -> Iterator[None]:
    """Leave MLX's random stream as it was, whatever is drawn meanwhile."""
    words = _key_words()
    try:
        yield
    finally:
        _put_key(words)


def _key_words() -> list[int]:
    return [int(word) for word in cast(list[int], random_key().tolist())]


def _put_key(words: list[int]) -> None:
    import mlx.core as mx

    # `seed` builds the key out of the two halves of its argument, so this gives back exactly this key.
    mx.random.seed((words[0] << 32) | words[1])


def _containers(state: Any) -> list[dict[object, object] | list[object]]:
    """Every container of a state that a step can write to; refuses a state in which there is none."""
    found = containers_of(state)
    if not found and state != ():
        arrays = next(arrays_of(state), None) is not None
        what = "a bare array, which a step cannot change" if arrays else f"a {type(state).__name__}"
        raise InvalidArgumentError(
            f"state={what}: pass what the step updates, such as state=(model, optimizer), or state=() for nothing."
        )
    return found


def _changing_arrays(state: object) -> dict[int, str]:
    """Names for the arrays that training replaces, by identity: all but modules' frozen ones."""
    import mlx.core as mx
    import mlx.nn as nn

    left: set[int] = {id(a) for a in arrays_of(mx.random.state)}
    for module in outermost(state, nn.Module):
        trainable = {id(a) for a in arrays_of(module.trainable_parameters())}
        left |= {id(a) for a in arrays_of(module.parameters())} - trainable
    slots = {id(slot.array): slot.array.dtype for slot in state_arrays(state)}
    changing = (i for i, dtype in slots.items() if i not in left and dtype != mx.float64)  # which no such file holds
    return {i: str(number) for number, i in enumerate(changing)}


def _kept(value: object, spilled_ids: dict[int, str], to_disk: dict[str, object]) -> object:
    """A value as it is put aside: arrays by a handle of their own, or noted for the disk."""
    import mlx.core as mx

    if isinstance(value, set):
        return _KeptSet(value)
    if type(value) is tuple:
        return tuple(_kept(v, spilled_ids, to_disk) for v in value)
    if not isinstance(value, mx.array):
        return value
    if id(value) in spilled_ids:
        to_disk[spilled_ids[id(value)]] = value
        return _Spilled(spilled_ids[id(value)])
    # A handle of its own keeps the values even where the step writes into the array in place; no bytes are copied.
    return _Kept(value)


class _Kept:
    """An array object, and a second handle on the values it has now."""

    def __init__(self, array: object) -> None:
        self.array = array
        self.values = copy.copy(array)


class _KeptSet:
    """A set, such as the names of a module's frozen parameters, and what is in it now."""

    def __init__(self, kept: set[object]) -> None:
        self.kept = kept
        self.items = frozenset(kept)

    def back(self) -> set[object]:
        """The same set, with what was in it."""
        self.kept.clear()
        self.kept.update(self.items)
        return self.kept


def _let_go(container: Any, items: Any) -> None:
    """Drop what stands where spilled arrays go; kept arrays are held by the snapshot anyway."""

    def wait(value: object) -> bool:
        return isinstance(value, _Spilled) or (type(value) is tuple and any(wait(v) for v in value))

    if isinstance(container, list):
        container[:] = [None] * len(items)
        return
    for name in [name for name in container if name not in items or wait(items[name])]:
        dict.__setitem__(container, name, None)


def _put_back(
    container: Any, items: Any, on_disk: dict[str, object], loaded: dict[str, object], copies: dict[int, object]
) -> None:
    """Give a container its items again; arrays that it shares with others stay shared."""

    def back(value: object) -> object:
        if isinstance(value, _Spilled):
            if value.name not in loaded:
                import mlx.core as mx

                loaded[value.name] = on_disk.pop(value.name)
                mx.eval(loaded[value.name])  # read now: the file goes away with the snapshot
            return loaded[value.name]
        if isinstance(value, _Kept):
            # One new handle for each array, so that tied weights stay tied and the kept one stays untouched.
            return copies.setdefault(id(value.array), copy.copy(value.values))
        if isinstance(value, _KeptSet):
            return value.back()
        return tuple(back(v) for v in value) if type(value) is tuple else value

    if isinstance(container, list):
        container[:] = [back(value) for value in items]
        return
    wanted = {name: back(value) for name, value in items.items()}
    dict.clear(container)
    dict.update(container, wanted)


@contextmanager
def same_training(model: nn.Module) -> Iterator[None]:
    """Put back each module's own training flag after the block: `model.train()` sets the same one everywhere."""
    flags = [(module, module.training) for module in model.modules() if has_mode(module)]
    try:
        yield
    finally:
        for module, training in flags:
            set_mode(module, training)
