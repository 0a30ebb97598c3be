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
from pathlib import Path
from typing import Any

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.interrupts import uninterrupted
from mlx_tune.scratch import ScratchFiles


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

    def __init__(self, state: Any, *, spill: bool = False, folder: str | os.PathLike[str] | None = None) -> None:
        """Walk the state and note everything in it."""
        self._scratch = ScratchFiles("What trials put aside", name="state", folder=folder)
        self._file: Path | None = None
        self._saved: list[tuple[Any, Any, dict[str, Any] | None]] = []  # container, its items, its attributes
        self._random = _RandomStreams()
        to_disk: dict[str, Any] = {}
        spilled_ids = _changing_arrays(state) if spill else {}
        for container in _containers(state):
            self._saved.append(_shallow(container, spilled_ids, to_disk))
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
                for container, items, attributes in self._saved:
                    _let_go(container, items, attributes)
            loaded: dict[str, Any] = {}
            copies: dict[int, Any] = {}
            for container, items, attributes in self._saved:
                _put_back(container, items, attributes, on_disk, loaded, copies)
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

    def _open(self) -> dict[str, Any]:
        """The spilled arrays, not read yet; raises before anything is touched if the file is gone."""
        if self._file is None:
            return {}
        import mlx.core as mx

        arrays: dict[str, Any] = mx.load(str(self._file))  # type: ignore[assignment]
        return arrays


class _RandomStreams:
    """MLX's stream of this thread, and Python's and NumPy's global ones."""

    def __init__(self) -> None:
        import mlx.core as mx

        key: Any = mx.random.state[0]  # type: ignore[index]  # MLX's stubs call the list an object
        self._key = [int(word) for word in key.tolist()]
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def restore(self) -> None:
        import mlx.core as mx

        # `seed` builds the key out of the two halves of its argument, so this gives back exactly this key.
        mx.random.seed((self._key[0] << 32) | self._key[1])
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _children(node: Any) -> Iterator[Any]:
    """The children of a node of the state, one level down."""
    if isinstance(node, dict):
        yield from node.values()
        yield from getattr(node, "__dict__", {}).values()  # a module's plain attributes
    elif isinstance(node, (list, tuple)):
        yield from node
    elif _is_optimizer(node):
        yield from vars(node).values()


def _is_optimizer(node: Any) -> bool:
    from mlx.optimizers import Optimizer

    return isinstance(node, Optimizer)


def _containers(state: Any) -> list[Any]:
    """Every mutable container reachable from `state`, each once, outermost first."""
    import mlx.core as mx

    seen: set[int] = set()
    found, arrays, waiting = [], 0, [state]
    while waiting:
        node = waiting.pop()
        if isinstance(node, mx.array):
            arrays += 1
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, (dict, list)) or _is_optimizer(node):
            found.append(node)
        waiting.extend(_children(node))
    if not found and state != ():
        what = "a bare array, which a step cannot change" if arrays else f"a {type(state).__name__}"
        raise InvalidArgumentError(
            f"state={what}: pass what the step updates, such as state=(model, optimizer), or state=() for nothing."
        )
    return found


def _changing_arrays(state: Any) -> dict[int, str]:
    """Names for the arrays that training replaces, by identity: all but modules' frozen ones."""
    import mlx.core as mx
    import mlx.nn as nn

    frozen: set[int] = set()
    every: dict[int, str] = {}
    for container in _containers(state):
        if isinstance(container, nn.Module):
            trainable = {id(a) for a in _leaves(container.trainable_parameters())}
            frozen |= {id(a) for a in _leaves(container.parameters())} - trainable
        for child in _children(container):
            if isinstance(child, mx.array) and child.dtype != mx.float64:  # which safetensors files do not hold
                every.setdefault(id(child), f"{len(every)}")
    random_state = {id(a) for a in _leaves(mx.random.state)}
    return {i: name for i, name in every.items() if i not in frozen and i not in random_state}


def _leaves(tree: Any) -> list[Any]:
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat]


def _shallow(
    container: Any, spilled_ids: dict[int, str], to_disk: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any] | None]:
    """One container with what it holds, arrays kept by a handle of their own or noted for the disk."""
    import mlx.core as mx

    def keep(value: Any) -> Any:
        if isinstance(value, set):
            return _KeptSet(value)
        if not isinstance(value, mx.array):
            return tuple(keep(v) for v in value) if type(value) is tuple else value
        if id(value) in spilled_ids:
            to_disk[spilled_ids[id(value)]] = value
            return _Spilled(spilled_ids[id(value)])
        # A handle of its own keeps the values even where the step writes into the array in place; no bytes are copied.
        return _Kept(value)

    attributes = None
    if not isinstance(container, list) and hasattr(container, "__dict__"):
        attributes = {name: keep(value) for name, value in vars(container).items()}
    if isinstance(container, dict):
        return container, {name: keep(value) for name, value in container.items()}, attributes
    if isinstance(container, list):
        return container, [keep(value) for value in container], attributes
    return container, None, attributes


class _Kept:
    """An array object, and a second handle on the values it has now."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.values = copy.copy(array)


class _KeptSet:
    """A set, such as the names of a module's frozen parameters, and what is in it now."""

    def __init__(self, kept: set[Any]) -> None:
        self.kept = kept
        self.items = frozenset(kept)

    def back(self) -> set[Any]:
        """The same set, with what was in it."""
        self.kept.clear()
        self.kept.update(self.items)
        return self.kept


def _let_go(container: Any, items: Any, attributes: dict[str, Any] | None) -> None:
    """Drop what stands where spilled arrays go; kept arrays are held by the snapshot anyway."""

    def wait(value: Any) -> bool:
        return isinstance(value, _Spilled) or (type(value) is tuple and any(wait(v) for v in value))

    if isinstance(container, dict):
        for name in [name for name in container if name not in items or wait(items[name])]:
            dict.__setitem__(container, name, None)
    elif isinstance(container, list):
        container[:] = [None] * len(items)
    for name, value in (attributes or {}).items():
        if wait(value):
            vars(container)[name] = None


def _put_back(
    container: Any,
    items: Any,
    attributes: dict[str, Any] | None,
    on_disk: dict[str, Any],
    loaded: dict[str, Any],
    copies: dict[int, Any],
) -> None:
    """Give a container its items and attributes again; arrays that it shares with others stay shared."""

    def back(value: Any) -> Any:
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

    if isinstance(container, dict):
        wanted = {name: back(value) for name, value in items.items()}
        dict.clear(container)
        dict.update(container, wanted)
    elif isinstance(container, list):
        container[:] = [back(value) for value in items]
    if attributes is not None:
        wanted = {name: back(value) for name, value in attributes.items()}
        vars(container).clear()
        vars(container).update(wanted)
