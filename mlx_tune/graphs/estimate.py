"""`estimate_memory`: what a training step needs at the least, and what it is spent on, without running it."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mlx_tune.devices import Backend
from mlx_tune.garbage import no_collections
from mlx_tune.graphs.backends import Rules, rules_of
from mlx_tune.graphs.graph import Graph
from mlx_tune.graphs.owners import modules_of
from mlx_tune.graphs.simulating.allocator import PURPOSES, Buffer
from mlx_tune.graphs.simulating.order import evaluation_order
from mlx_tune.graphs.simulating.timeline import Timeline, simulate
from mlx_tune.graphs.tracing.trace import taking, trace_step
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import dtype_name, format_bytes, format_percent, format_seconds, parse_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PeakOwner:
    """One buffer that is alive at the peak.

    Attributes:
        nbytes: Its size.
        shape: Shape of the array it was made for.
        dtype: Dtype of that array, as in "float32".
        operation: The MLX operation that made it; empty for what existed before the step.
        purpose: One of `PURPOSES`.
        label: A parameter's path or an argument's place; for an update, what it is the new value of; empty for
            everything else that an operation made.
        module: The path of the module whose parameters the operation used, or that made what it used, as far as the
            graph tells; where several come together the path that they share.
    """

    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    operation: str
    purpose: str
    label: str
    module: str = ""

    @property
    def place(self) -> str:
        """Where it belongs, in words: its module, or what it is for, or both."""
        where = self.label if self.purpose == "updates" else self.module
        if not self.operation or not where:
            return self.purpose
        return where if self.purpose == "activations" else f"{self.purpose} of {where}"

    def to_dict(self) -> dict[str, Json]:
        """The same as plain values."""
        return {
            "nbytes": self.nbytes,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "operation": self.operation,
            "purpose": self.purpose,
            "label": self.label,
            "module": self.module,
        }


@dataclass(frozen=True)
class MemoryEstimate(Tabular):
    """The memory of one training step, predicted from its graph.

    All figures are predictions; none was measured.

    Attributes:
        floor_bytes: The least memory that the step can peak at: parameters, optimizer state and batch included.
            It is reached under the lowest memory limit; without a limit the peak is higher.
        start_bytes: The memory before the step: state, batch and captured arrays.
        end_bytes: The memory after it.
        by_purpose: The floor split over `PURPOSES`; the parts add up to `floor_bytes`.
        peak_owners: Every buffer alive at the peak, the largest first.
        live_bytes: The most bytes alive while each operation is evaluated, in the order of evaluation.
        live_by_purpose: The same split over `PURPOSES`.
        operations: The operations' names, in the same order.
        peak_operation: Position of the operation at which the peak is reached; -1 before the first.
        compiled: True where the step, or its outermost part, goes through `mx.compile`.
        stand_ins: Operations that could not be traced, and what was traced in their place.
        unknown_operations: Operations whose effect on memory is not known, and how often they occur. Each was
            taken to allocate its outputs and nothing else.
        trace_seconds: Time that tracing and simulating took.
        notes: Further remarks, with how far the backend's rules were measured.
        backend: The backend that the step was priced for.
        peak_bytes: The most that the step is expected to peak at under `limit_bytes`: dispatch is as far ahead of the
            device as MLX lets it be. Where the device is faster than dispatch the peak is closer to the floor.
        limit_bytes: The memory limit that `peak_bytes` is for; None for none.
        command_buffers: On a GPU the kernels in each command buffer, or CUDA graph, that goes to the device full: what
            is read in one is held until it has run. The last one, which is not full, is left out.
    """

    floor_bytes: int
    start_bytes: int
    end_bytes: int
    by_purpose: dict[str, int]
    peak_owners: tuple[PeakOwner, ...]
    live_bytes: tuple[int, ...] = field(repr=False)
    live_by_purpose: dict[str, tuple[int, ...]] = field(repr=False)
    operations: tuple[str, ...] = field(repr=False)
    peak_operation: int
    compiled: bool
    stand_ins: dict[str, str]
    unknown_operations: dict[str, int]
    trace_seconds: float
    notes: tuple[str, ...] = ()
    backend: Backend = "cpu"
    peak_bytes: int = 0
    limit_bytes: int | None = None
    command_buffers: tuple[int, ...] = field(default=(), repr=False)

    @property
    def parameters_bytes(self) -> int:
        """Bytes of the parameters alive at the peak."""
        return self.by_purpose["parameters"]

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state alive at the peak."""
        return self.by_purpose["optimizer"]

    @property
    def activations_bytes(self) -> int:
        """Bytes of what the forward and backward pass hold at the peak."""
        return self.by_purpose["activations"]

    @property
    def temporaries_bytes(self) -> int:
        """Bytes of operations' working memory at the peak."""
        return self.by_purpose["temporaries"]

    def to_dict(self) -> dict[str, Json]:
        """Everything as plain values, ready for JSON."""
        return {
            "floor_bytes": self.floor_bytes,
            "start_bytes": self.start_bytes,
            "end_bytes": self.end_bytes,
            "by_purpose": dict(self.by_purpose),
            "peak_owners": [owner.to_dict() for owner in self.peak_owners],
            "live_bytes": list(self.live_bytes),
            "live_by_purpose": {name: list(live) for name, live in self.live_by_purpose.items()},
            "operations": list(self.operations),
            "peak_operation": self.peak_operation,
            "compiled": self.compiled,
            "stand_ins": dict(self.stand_ins),
            "unknown_operations": dict(self.unknown_operations),
            "trace_seconds": self.trace_seconds,
            "notes": list(self.notes),
            "backend": self.backend,
            "peak_bytes": self.peak_bytes,
            "limit_bytes": self.limit_bytes,
            "command_buffers": list(self.command_buffers),
        }

    def table(self) -> Table:
        """A table of what the peak is made of."""
        purposes = [
            (name, format_bytes(n), format_percent(n / max(self.floor_bytes, 1)), "")
            for name, n in self.by_purpose.items()
            if n
        ]
        largest = [
            (
                f"  {owner.operation or owner.label}",
                format_bytes(owner.nbytes * count),
                format_percent(owner.nbytes * count / max(self.floor_bytes, 1)),
                f"{list(owner.shape)} {owner.dtype}{f' x {count}' if count > 1 else ''}, {owner.place}",
            )
            for owner, count in self.largest_owners()
        ]
        notes = [
            f"Predicted from {len(self.operations)} operations in {format_seconds(self.trace_seconds)}; nothing was "
            f"run. The peak is at operation {self.peak_operation + 1}"
            + (f" ({self.operations[self.peak_operation]})." if self.peak_operation >= 0 else "."),
            *(f"Stand-in for {name}: {what}." for name, what in self.stand_ins.items()),
            *(
                f"Unknown operation {name}, {count} times: taken to allocate its outputs only."
                for name, count in self.unknown_operations.items()
            ),
            *self.notes,
            self._range(),
        ]
        return Table(
            ["at the peak", "bytes", "share", "what"],
            [*purposes, *largest],
            title=f"Floor of the step: {format_bytes(self.floor_bytes)}",
            notes=notes,
        )

    def _range(self) -> str:
        """The words on what the peak may be besides the floor."""
        limit = "without a memory limit" if self.limit_bytes is None else f"under {format_bytes(self.limit_bytes)}"
        return (
            f"The floor is reached under the lowest memory limit; {limit} the step peaks at up to "
            f"{format_bytes(self.peak_bytes)}, as far as dispatch runs ahead of the device."
        )

    def largest_owners(self, most: int = 10) -> list[tuple[PeakOwner, int]]:
        """The largest kinds of buffers at the peak: one of each kind, and how many there are.

        Buffers in the same place of several blocks are one kind: the numbers that differ in its paths are stars then.

        Args:
            most: The number of kinds at most.
        """
        kinds: dict[PeakOwner, list[PeakOwner]] = {}
        for owner in self.peak_owners:
            kind = replace(owner, label=_starred(owner.label), module=_starred(owner.module))
            kinds.setdefault(kind, []).append(owner)
        ranked = sorted(kinds, key=lambda kind: (-kind.nbytes * len(kinds[kind]), kind.operation, kind.label))
        return [(_in_common(kinds[kind]), len(kinds[kind])) for kind in ranked[:most]]

    def plot(self, path: str | os.PathLike[str] | None = None, *, dark: bool = False) -> Figure:
        """Draw memory over the step's operations, with the owners of the peak named.

        Args:
            path: An .svg or .png file to write as well.
            dark: For dark pages.

        Returns:
            The matplotlib figure.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from mlx_tune.graphs.memory_picture import draw_memory

        largest = [
            f"{format_bytes(owner.nbytes * count)}  {owner.operation or owner.label}, {list(owner.shape)}"
            f"{f' x {count}' if count > 1 else ''}, {owner.place}"
            for owner, count in self.largest_owners(6)
        ]
        return draw_memory(self.live_by_purpose, self.by_purpose, self.peak_operation, largest, path, dark=dark)


def estimate_memory(
    step: Callable[..., object],
    *args: object,
    state: object = (),
    backend: str | None = None,
    limit: int | str | None = None,
    state_first: bool = False,
) -> MemoryEstimate:
    """Predict the least memory that one call of `step(*args)` needs, without evaluating anything.

    The step's Python runs once with placeholders for arrays. Its graph is then put in the order in which MLX would
    evaluate it, and every allocation, donation and release is followed, as MLX's backends do them. A step can be
    priced for another backend than this machine's: operations are then those that it has kernels for.

    Args:
        step: One training step. It only builds arrays (it does not evaluate) and returns the loss first.
        *args: Its arguments: arrays, nestings of them, or `mlx_tune.ArraySpec(shape, dtype)` for arrays that
            need not exist. A single tuple or dictionary is a batch: it is spread over the step's arguments where the
            step takes more than one.
        state: Objects that the step changes, such as `(model, optimizer)`. It is afterwards as it was. An optimizer
            that has not run yet, and arrays of which the step makes a wider dtype, are taken as they are from the
            second step on.
        backend: "metal", "cuda" or "cpu"; by default what this process computes on. Another machine's device is taken
            to be an H200 or a Max chip: how much is held until it has run depends on that.
        limit: The memory limit that `peak_bytes` is to be for, in bytes or as text such as "12GB"; none by default.
        state_first: True where the training loop evaluates the state before the loss, as `mx.eval(state, loss)` does
            and mlx-lm's trainer; False for `mx.eval(loss, state)`. MLX goes through a graph from what comes first, and
            a checkpointed step may hold 10 % more one way than the other.

    Returns:
        The floor, what it is made of, and memory over the step's operations.

    Raises:
        TraceError: The step evaluates, returns no array, or leaves arrays in places that are not in `state`.
        InvalidArgumentError: `step` is not callable or takes no such batch, `state` holds nothing that a step can
            change, or there is no such backend.

    Examples:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> from mlx_tune.graphs import ArraySpec
        >>> model, optimizer = nn.Linear(1024, 1024), optim.SGD(0.1)
        >>> def step(x):
        ...     loss, gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x)
        ...     optimizer.update(model, gradients)
        ...     return loss
        >>> estimate = estimate_memory(step, ArraySpec((10_000_000, 1024), mx.float32), state=(model, optimizer))
        >>> estimate.floor_bytes > 80e9
        True
        >>> estimate_memory(step, mx.zeros((8, 1024)), state=(model, optimizer), backend="cuda").backend
        'cuda'
    """
    started = time.perf_counter()
    with no_collections():
        rules = rules_of(backend)
        limit_bytes = None if limit is None else parse_bytes(limit)
        graph, timeline = follow_step(taking(step, args, state), args, state, rules, state_first=state_first)
        free = simulate(graph, timeline.order, rules, limit_bytes=math.inf if limit_bytes is None else limit_bytes)
        estimate = _estimate(graph, timeline, rules, time.perf_counter() - started)
        return replace(estimate, peak_bytes=max(free.peak_bytes, timeline.peak_bytes), limit_bytes=limit_bytes)


def follow_step(
    step: Callable[..., object],
    args: Sequence[object],
    state: object,
    rules: Rules | None = None,
    *,
    state_first: bool = False,
) -> tuple[Graph, Timeline]:
    """Trace a step and follow its memory: what `estimate_memory` does before it finds out whose memory that is.

    Args:
        step: As for `estimate_memory`.
        args: The step's arguments.
        state: Objects that the step changes.
        rules: The backend; that of this machine by default.
        state_first: As for `estimate_memory`.
    """
    with no_collections():
        rules = rules_of() if rules is None else rules
        graph = trace_step(step, args, state, rules=rules)
        return graph, simulate(graph, evaluation_order(graph, state_first=state_first), rules)


def _starred(path: str) -> str:
    """A path without the numbers of blocks in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _in_common(owners: list[PeakOwner]) -> PeakOwner:
    """One for several that differ in the numbers of their paths only."""

    def common(paths: list[str]) -> str:
        parts = zip(*(path.split(".") for path in paths), strict=True)
        return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)

    return replace(owners[0], label=common([o.label for o in owners]), module=common([o.module for o in owners]))


def _estimate(graph: Graph, timeline: Timeline, rules: Rules, seconds: float) -> MemoryEstimate:
    modules = modules_of(graph, timeline.order)
    updated = dict(zip(graph.outputs[graph.results :], graph.updated, strict=True))
    owners = sorted((_owner(graph, b, modules, updated) for b in timeline.owners), key=lambda o: -o.nbytes)
    split = dict.fromkeys(PURPOSES, 0)
    for owner in owners:
        split[owner.purpose] += owner.nbytes
    return MemoryEstimate(
        floor_bytes=timeline.peak_bytes,
        start_bytes=timeline.start_bytes,
        end_bytes=timeline.end_bytes,
        by_purpose=split,
        peak_owners=tuple(owners),
        live_bytes=tuple(timeline.live),
        live_by_purpose=_by_purpose(timeline),
        operations=tuple(graph.nodes[i].name for i in timeline.order),
        peak_operation=timeline.peak_step,
        compiled=graph.compiled,
        stand_ins=graph.stand_ins,
        unknown_operations=dict(timeline.unknown),
        trace_seconds=seconds,
        notes=(*graph.notes, *([rules.measured] if rules.name != "cpu" else [])),
        backend=rules.name,
        command_buffers=tuple(timeline.command_buffers),
    )


def _by_purpose(timeline: Timeline) -> dict[str, tuple[int, ...]]:
    columns = zip(*timeline.split, strict=True) if timeline.split else [()] * len(PURPOSES)
    return dict(zip(PURPOSES, columns, strict=True))


def _owner(graph: Graph, buffer: Buffer, modules: dict[int, str], updated: dict[int, str]) -> PeakOwner:
    value = graph.values[buffer.value]
    return PeakOwner(
        nbytes=buffer.nbytes,
        shape=value.shape,
        dtype=dtype_name(value.dtype),
        operation=graph.nodes[buffer.node].name if buffer.node is not None else "",
        purpose=buffer.purpose,
        label=value.label or updated.get(buffer.value, ""),
        module=modules.get(buffer.value, ""),
    )
