"""The table of machines, and finding one in it by the name that people use."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from mlx_tune import devices
from mlx_tune.devices import Backend
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.memory import memory_budget
from mlx_tune.presentation.plain import Json
from mlx_tune.units import format_bytes, parse_bytes

#: The share of what a machine gives that is planned with, as `memory_budget` takes it.
SHARE = 0.9
#: Up to so many GB macOS gives two thirds, above three quarters.
_SMALL_GB = 32

_Entry = dict[str, Any]

_MAKERS = re.compile(r"^(apple|nvidia|geforce)\s+|^(mac|macbook pro|macbook air|mac studio|mac mini|imac)\s+(?=m\d)")
_MEMORY = re.compile(r"[\s(,-]*(\d+)\s*(?:gb|gib|g)\)?$")


@dataclass(frozen=True)
class NamedMachine:
    """A machine, and the memory that MLX may use of it.

    Attributes:
        name: The name that people say, such as "M3 Max 64 GB".
        backend: The backend of MLX that runs there.
        memory_bytes: All of its memory: RAM of a Mac, the GPU's own of a card.
        usable_bytes: The recommended working set of a Mac, the memory of a card; on this machine what is free now.
        budget_bytes: The part of it to plan with: the rest is for what nobody counts.
        bandwidth_gb_s: Memory bandwidth in GB/s; None where it is not in the table.
        reading: True where `usable_bytes` was read on such a machine, False where it follows from a rule.
        source: Where the figure comes from.
    """

    name: str
    backend: Backend
    memory_bytes: int
    usable_bytes: int
    budget_bytes: int
    bandwidth_gb_s: float | None
    reading: bool
    source: str

    def __str__(self) -> str:
        """The name, and the budget with its origin."""
        kind = "read" if self.reading else "by rule"
        return f"{self.name}: {format_bytes(self.budget_bytes)} of {format_bytes(self.usable_bytes)} usable ({kind})"

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return asdict(self)


def find_machine(name: str) -> NamedMachine:
    """Find a machine by its name.

    Args:
        name: A chip and its memory, such as "M3 Max 64GB"; a card, such as "RTX 4090" or "A100 80GB"; "Mac 32GB" for
            any Mac with so much memory. Makers, case and blanks do not matter. Of chips that come with one size of
            memory the size may be left out.

    Raises:
        InvalidArgumentError: No such machine; the text has the nearest names.

    Examples:
        >>> find_machine("m3 max 64gb").usable_bytes == 48 * 2**30
        True
        >>> find_machine("rtx4090").backend
        'cuda'
    """
    wanted = _MAKERS.sub("", " ".join(name.lower().split()))
    size = _MEMORY.search(wanted)
    chip = wanted[: size.start()] if size else wanted
    known = {_plain(entry["chip"]): entry for entry in _chips()}
    if _plain(chip) == "mac" and size:
        return mac(int(size[1]))
    entry = known.get(_plain(chip)) or known.get(_plain(wanted))
    if entry is None:
        raise InvalidArgumentError(f"machine={name!r} is not in the table. {_nearest(wanted)}")
    sizes: list[int] = entry["memory_gb"]
    if size is None or _plain(wanted) in known:
        if len(sizes) > 1:
            raise InvalidArgumentError(
                f"machine={name!r}: say with how much memory, such as {entry['chip']} {sizes[0]}GB. "
                f"It comes with {_listed(sizes)} GB."
            )
        memory = sizes[0]
    else:
        memory = int(size[1])
    if memory not in sizes:
        raise InvalidArgumentError(
            f"machine={name!r}: {entry['chip']} comes with {_listed(sizes)} GB. Name one of these, or give the memory "
            "alone."
        )
    speeds: list[float] = entry["bandwidth_gb_s"]
    speed = speeds[sizes.index(memory)] if len(speeds) > 1 else speeds[0]
    if entry["backend"] == "metal":
        return mac(memory, chip=entry["chip"], bandwidth_gb_s=speed)
    # A card's memory is a little more than its name says in decimal units, and its driver keeps a little of it.
    usable = memory * 10**9
    return NamedMachine(
        f"{entry['chip']} {memory} GB",
        "cuda",
        usable,
        usable,
        int(SHARE * usable),
        speed,
        False,
        _table()["sources"]["nvidia"],
    )


def mac(memory_gb: int, *, chip: str = "Mac", bandwidth_gb_s: float | None = None) -> NamedMachine:
    """A Mac with so much memory.

    Args:
        memory_gb: Memory as Apple counts it, in units of 2^30 bytes.
        chip: Its chip.
        bandwidth_gb_s: Its memory bandwidth.
    """
    memory, given = memory_gb * 2**30, _table()["working_set"]
    read = next((entry for entry in given["readings"] if entry["memory_gb"] == memory_gb), None)
    by_rule = memory * 2 // 3 if memory_gb <= _SMALL_GB else memory * 3 // 4
    usable = by_rule if read is None else int(read["bytes"])
    source = given["rule"] if read is None else f"read on {read['chip']}, {read['source']}"
    name = f"{chip} {memory_gb} GB"
    return NamedMachine(name, "metal", memory, usable, int(SHARE * usable), bandwidth_gb_s, read is not None, source)


def machine_of_memory(size: str | int | float) -> NamedMachine:
    """A Mac with so much memory, given as bytes or text such as "64GB", which for a Mac means 64 GiB.

    Raises:
        InvalidArgumentError: No size, or less than 1 GB.
    """
    memory_bytes = parse_bytes(size)
    binary = (isinstance(size, str) and "i" in size.lower()) or memory_bytes % 2**30 == 0
    memory_gb = memory_bytes // (2**30 if binary else 10**9)
    if memory_gb < 1:
        raise InvalidArgumentError(
            f"memory={size!r}: that is less than 1 GB. Give the memory of the machine, as '64GB'."
        )
    return mac(memory_gb)


def this_machine() -> NamedMachine:
    """The machine that this runs on, with what is free on it now."""
    here, budget = devices.machine(), memory_budget(SHARE)
    return NamedMachine(
        here.name, here.backend, here.memory_bytes, round(int(budget) / SHARE), int(budget), None, True, budget.source
    )


def given_budget(size: str | int | float, machine: NamedMachine) -> NamedMachine:
    """The same machine with a budget that somebody chose, which is taken as it is."""
    chosen = parse_bytes(size)
    if chosen == 0:
        raise InvalidArgumentError(f"budget={size!r} leaves nothing to work with: give a size such as '8GB'.")
    return replace(machine, usable_bytes=chosen, budget_bytes=chosen, reading=False, source="given")


@functools.cache
def mac_sizes() -> tuple[int, ...]:
    """Sizes of memory that Macs of the table come with, in GB, ascending."""
    return tuple(sorted({gb for entry in _chips() if entry["backend"] == "metal" for gb in entry["memory_gb"]}))


def smallest_mac(needed_bytes: int) -> int | None:
    """The smallest memory, in GB, of a Mac whose budget holds so many bytes; None where no Mac's does.

    Examples:
        >>> smallest_mac(20_000_000_000)
        32
    """
    return next((gb for gb in mac_sizes() if mac(gb).budget_bytes >= needed_bytes), None)


def machine_names() -> tuple[str, ...]:
    """Every machine of the table, by its name."""
    return tuple(f"{entry['chip']} {gb} GB" for entry in _chips() for gb in entry["memory_gb"])


@functools.cache
def _table() -> _Entry:
    table: _Entry = json.loads(files("mlx_tune.machines").joinpath("machines.json").read_text("utf-8"))
    return table


def _chips() -> list[_Entry]:
    return [
        {**entry, "backend": backend}
        for maker, backend in (("apple", "metal"), ("nvidia", "cuda"))
        for entry in _table()[maker]
    ]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _nearest(wanted: str) -> str:
    names = machine_names()
    plain = {_plain(name): name for name in names}
    near = difflib.get_close_matches(_plain(wanted), plain, n=3, cutoff=0.5)
    if near:
        return f"The nearest are {_listed([plain[name] for name in near])}."
    return f"It has {names[0]} to {names[-1]}; give --memory for another Mac, or a budget in bytes."


def _listed(items: Sequence[object]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
