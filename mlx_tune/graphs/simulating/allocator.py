"""The buffers of a simulated evaluation: which array lies in which, what each is for, and who still needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from mlx_tune.graphs.graph import Graph, Node
from mlx_tune.graphs.simulating.layouts import Layout, row_major

# An input may become the output if its buffer is at most this much larger: mlx/backend/common/utils.h.
DONATION_SLACK = 16384


#: What memory can be for, in the order in which tables and pictures show it.
PURPOSES = ("parameters", "optimizer", "batch", "other state", "activations", "updates", "temporaries")

_PURPOSE_OF_ROLE = {"parameter": "parameters", "optimizer": "optimizer", "batch": "batch"}
_PLACE = {purpose: place for place, purpose in enumerate(PURPOSES)}


class Buffer(NamedTuple):
    """One allocation: its bytes, what it is for, the value it was made for, the node that made it, if any."""

    nbytes: int
    purpose: str
    value: int
    node: int | None


@dataclass
class Allocator:
    """The state of a simulated evaluation: which array lies in which buffer, and who still needs it.

    `rounded` gives the bytes that an allocation takes; `launches` counts the kernels of the current operation.
    """

    graph: Graph
    order: list[int]
    rounded: Callable[[int], int] = int
    launches: int = 0
    live: int = 0
    peak: int = -1
    peak_step: int = -1
    peak_buffer: int = -1
    step: int = -1
    layout: dict[int, Layout] = field(default_factory=dict)
    buffer: dict[int, int] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    holders: list[int] = field(default_factory=list)
    followed_by: dict[int, int] = field(default_factory=dict)
    references: list[int] = field(default_factory=list)
    temporaries: list[int] = field(default_factory=list)
    updates: frozenset[int] = frozenset()
    now: list[int] = field(default_factory=lambda: [0] * len(PURPOSES))
    high: int = 0
    high_split: list[int] = field(default_factory=list)

    def nbytes(self, value: int) -> int:
        """Bytes of a value when every element is stored."""
        return self.graph.values[value].nbytes

    def shape(self, value: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.graph.values[value].shape

    def itemsize(self, value: int) -> int:
        """Bytes of an element of a value."""
        return self.graph.values[value].dtype.size

    def donatable(self, value: int, out: int | None = None) -> bool:
        """True where nothing else needs `value`, so that `out` may take over its buffer."""
        if self.references[value] != 1 or self.holders[self.buffer[value]] != 1:
            return False
        if out is None:
            return True
        size = self.buffers[self.buffer[value]].nbytes
        return self.itemsize(value) == self.itemsize(out) and size <= self.nbytes(out) + DONATION_SLACK

    def allocate(self, value: int, layout: Layout | None = None) -> None:
        """Give `value` a buffer of its own, by default row contiguous."""
        if layout is None:
            self.layout[value] = row_major(self.shape(value))
            self.buffer[value] = self._new(self.nbytes(value), value)
        else:
            self.layout[value] = layout
            self.buffer[value] = self._new(layout.data_size * self.itemsize(value), value)

    def share(self, value: int, source: int, layout: Layout | None = None) -> None:
        """Let `value` lie in the buffer of `source`."""
        self.layout[value] = layout or self.layout[source]
        self.buffer[value] = self.buffer[source]
        self.holders[self.buffer[source]] += 1

    def copied(self, value: int, out: int, whole: bool) -> None:
        """Let `out` be a copy of `value`, in its place where nothing else needs it; `whole` keeps its layout."""
        if not whole:
            self.allocate(out)
        elif self.donatable(value, out):
            self.share(out, value)
        else:
            self.allocate(out, self.layout[value])

    def rows(self, value: int, out: int) -> None:
        """Copy `value` for an operation that takes nothing but rows, unless it lies in rows."""
        if not self.layout[value].row:
            self.copy_of(value, out)

    def copy_of(self, value: int, out: int) -> None:
        """Copy `value` for the operation that makes `out`, whole and in rows."""
        self.launches += 1
        self.temporary(self.nbytes(value), out)

    def temporary(self, nbytes: int, value: int) -> None:
        """Allocate working memory that is held until the operation that made `value` has run."""
        self.temporaries.append(self._new(nbytes, value, temporary=True))

    def release(self, buffer: int) -> None:
        """Let go of a buffer once."""
        self.holders[buffer] -= 1
        if self.holders[buffer] == 0:
            gone = self.buffers[buffer]
            self.live -= gone.nbytes
            self.now[_PLACE[gone.purpose]] -= gone.nbytes
            self.followed_by[buffer] = len(self.buffers)

    def owners(self) -> list[Buffer]:
        """The buffers that were alive when the one was made that made the peak."""
        gone = len(self.buffers)
        upto = enumerate(self.buffers[: self.peak_buffer + 1])
        return [buffer for i, buffer in upto if self.followed_by.get(i, gone) > self.peak_buffer]

    def _new(self, nbytes: int, value: int, temporary: bool = False) -> int:
        node = self.order[self.step] if self.step >= 0 else None
        if temporary:
            purpose = "temporaries"
        elif (role := self.graph.values[value].role) == "made":
            purpose = "updates" if value in self.updates else "activations"
        else:
            purpose = _PURPOSE_OF_ROLE.get(role, "other state")
        nbytes = self.rounded(nbytes)
        self.buffers.append(Buffer(nbytes, purpose, value, node))
        self.holders.append(1)
        self.live += nbytes
        self.now[_PLACE[purpose]] += nbytes
        if self.live > self.high:
            self.high, self.high_split = self.live, self.now.copy()
        if self.live > self.peak:
            self.peak, self.peak_step, self.peak_buffer = self.live, self.step, len(self.buffers) - 1
        return len(self.buffers) - 1


#: The function that follows the memory of one primitive.
Effect: TypeAlias = Callable[[Allocator, Node], None]


def table(effect: Effect, source: str, names: str) -> dict[str, tuple[Effect, str]]:
    """Rows of a table of effects.

    Args:
        effect: The function.
        source: The file under mlx/backend that it follows.
        names: The primitives.
    """
    return dict.fromkeys(names.split(), (effect, source))
