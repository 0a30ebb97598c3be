"""Replacing modules so that all of it can be undone, without holding the replaced weights in memory."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.devices import backend
from mlx_tune.errors import DiskError
from mlx_tune.files.scratch import ScratchFiles, in_memory
from mlx_tune.interrupts import uninterrupted
from mlx_tune.memory import memory_budget
from mlx_tune.quantization.models.sites import Site, WalkedModel, own_arrays
from mlx_tune.upstream import is_lazy

_log = logging.getLogger(__name__)

#: Of the memory of a card that nobody has taken, the part in which originals may wait.
_SHARE_FOR_ORIGINALS = 4


def room_for_originals() -> int:
    """The bytes of replaced weights that may wait in memory: a quarter of what a CUDA card has free, 0 elsewhere.

    Bringing 16 GB from an H200 to its disk took 22 s, and quantizing them 14. Where MLX computes in the machine's own
    memory, others want that memory too, and files are cached in what of it is free.
    """
    if backend() != "cuda":
        return 0
    return max(0, memory_budget() - mx.get_active_memory()) // _SHARE_FOR_ORIGINALS


class Transaction:
    """Every replacement inside the block is undone if the block fails; nothing is held twice meanwhile.

    A replaced module's weights go to a temporary file and leave memory, so that the model shrinks while it is
    quantized. Weights that were never read (of a lazily loaded model) stay as they are, since they hold no memory.
    If the disk has too little room, the originals stay in memory and `notes` says so. A card's memory holds them as far
    as `room_for_originals` goes, since writing them takes longer there than quantizing does.

    Args:
        model: The model whose modules are replaced.
        folder: Where the temporary files go; by default the system's temporary folder, or `/var/tmp` where that lies
            in memory.
        kept_bytes: Originals that stay in memory, as many of the first ones as fit into so many bytes; by default
            `room_for_originals()`.

    Attributes:
        notes: Remarks for a report.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> walked = WalkedModel(model)
        >>> with Transaction(walked) as transaction:
        ...     transaction.replace(walked.sites[1], nn.Linear(64, 64).to_quantized())
        ...     transaction.roll_back()
        >>> type(model.layers[0]).__name__
        'Linear'
    """

    def __init__(self, model: WalkedModel, *, folder: str | Path | None = None, kept_bytes: int | None = None) -> None:
        """Note which modules share arrays, so that undoing can tie them again."""
        self.model = model
        self._room = room_for_originals() if kept_bytes is None else kept_bytes
        self.notes: list[str] = []
        self._scratch = ScratchFiles("What quantizing sets aside", name="originals", folder=folder)
        self._log: list[tuple[Site, _Parked]] = []
        self._shared = _shared_slots(model)
        self._parked_shared: dict[int, _Slot] = {}

    def __enter__(self) -> Self:
        """Begin with the model as it is."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo everything if the block failed, then delete the files. A Ctrl-C waits until that is done."""
        with uninterrupted():
            try:
                if error is not None:
                    self.roll_back()
            finally:
                self._log.clear()
                self._parked_shared.clear()
                self._scratch.close()

    def replace(self, site: Site, module: nn.Module) -> None:
        """Put `module` in all places of a site of the model, and set the module that stood there aside.

        Args:
            site: A site of the model.
            module: The module to put there.
        """
        if not any(seen is site for seen, _ in self._log):  # only what stood here at first is ever wanted back
            kept = {id(a) for a in own_arrays(module).values()}  # such as a bias that goes on being used
            parked = self._park(site.module, kept)
            self._log.append((site, parked))  # first: a Ctrl-C between the two lines must find it there
        site.put(module)

    def original(self, site: Site) -> nn.Module:
        """The module that stood at a site when the transaction began, its weights read anew where they were set aside.

        Args:
            site: Of a module, replaced or not.
        """
        parked = next((parked for seen, parked in self._log if seen is site), None)
        return site.module if parked is None else parked.module(evaluate=False)

    def reference(self) -> nn.Module:
        """A model like the one before: every module in it a new object, weights shared with what is in place still.

        Weights that were set aside are read from their files when they are first used, and stay in memory from then
        on for as long as this model lives.
        """
        parked = {path: parked for site, parked in self._log for path in site.paths}
        return cast(nn.Module, _clone(self.model.model, "", parked))

    def roll_back(self) -> None:
        """Put every replaced module back; the last one is undone first. A Ctrl-C meanwhile waits."""
        with uninterrupted():
            for site, parked in reversed(self._log):
                site.put(parked.module(evaluate=True))
            self._log.clear()

    def _park(self, old: nn.Module, kept: set[int]) -> _Parked:
        slots: dict[str, _Slot] = {}
        to_disk: dict[str, mx.array] = {}
        for name, array in old.items():
            if not isinstance(array, mx.array):
                continue
            group = self._shared.get((id(old), name))
            if group is not None and group in self._parked_shared:
                slots[name] = self._parked_shared[group]
                continue
            if id(array) in kept or is_lazy(array) or name.startswith("_"):
                slots[name] = _Slot(array=array)
            elif array.nbytes <= self._room:
                self._room -= array.nbytes
                slots[name] = _Slot(array=array)
            else:
                to_disk[name] = array
                slots[name] = _Slot(array=None)
            if group is not None:
                self._parked_shared[group] = slots[name]
        if to_disk:
            file = self._save(to_disk)
            for name, array in to_disk.items():
                slots[name].fill(file, name, array)
        return _Parked(old, slots)

    def _save(self, arrays: dict[str, mx.array]) -> Path | None:
        """Write arrays to a file of their own, or say why they stay in memory."""
        try:
            file = self._scratch.save(arrays)
        except DiskError as error:
            self._note("The originals stayed in memory until the end", f". {error}")
            return None
        if in_memory(self._scratch.place):
            self._note(
                f"The originals were set aside in {self._scratch.place}, which lies in memory itself",
                ". Set TMPDIR to a folder on a disk to need less.",
            )
        return file

    def _note(self, begins: str, ends: str) -> None:
        """Say something once, with the words of its first time."""
        if not any(note.startswith(begins) for note in self.notes):
            self.notes.append(begins + ends)
            _log.warning("%s", self.notes[-1])


class _Slot:
    """Where one array of a parked module is: in memory, or in a file."""

    def __init__(self, array: mx.array | None) -> None:
        self.array = array
        self._file: Path | None = None
        self._name = ""

    def fill(self, file: Path | None, name: str, array: mx.array) -> None:
        """Say where the array went."""
        self._file, self._name = file, name
        if file is None:
            self.array = array

    def get(self, evaluate: bool) -> mx.array:
        """The array; with `evaluate` it is in memory from now on, one and the same for all who ask."""
        if self.array is not None:
            return self.array
        loaded: Any = mx.load(str(self._file))
        array: mx.array = loaded[self._name]
        if evaluate:
            mx.eval(array)
            self.array = array
        return array


class _Parked:
    """A replaced module without its weights: the object itself only for as long as others hold it."""

    def __init__(self, module: nn.Module, slots: dict[str, _Slot]) -> None:
        self._alive = weakref.ref(module)
        self._class = type(module)
        self._items = {name: slots.get(name, value) for name, value in module.items()}
        self._attributes = dict(vars(module))

    def module(self, evaluate: bool) -> nn.Module:
        """The module as it was: the same object where somebody still holds it, else one built of its parts."""
        alive = self._alive()
        if alive is not None:
            return alive
        twin = self._class.__new__(self._class)
        vars(twin).update(self._attributes)
        for name, value in self._items.items():
            dict.__setitem__(twin, name, value.get(evaluate) if isinstance(value, _Slot) else value)
        if evaluate:
            self._alive = weakref.ref(twin)
        return twin


def _clone(node: object, path: str, parked: dict[str, _Parked]) -> object:
    """The node and everything below it anew, arrays shared, parked modules as they were."""
    if path in parked:
        return parked[path].module(evaluate=False)
    below = f"{path}." if path else ""
    if isinstance(node, list):
        return [_clone(child, f"{below}{i}", parked) for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    twin: Any = type(node).__new__(type(node))
    if isinstance(node, nn.Module):
        vars(twin).update(vars(node))
    for name, child in node.items():
        dict.__setitem__(twin, name, _clone(child, f"{below}{name}", parked))
    return twin


def _shared_slots(model: WalkedModel) -> dict[tuple[int, str], int]:
    """(module, name of its array) to the number of the group that shares one array, where more than one does."""
    holders: dict[int, list[tuple[int, str]]] = {}
    for site in model.sites:
        for name, array in own_arrays(site.module).items():
            holders.setdefault(id(array), []).append((id(site.module), name))
    return {slot: number for number, slots in enumerate(s for s in holders.values() if len(s) > 1) for slot in slots}
