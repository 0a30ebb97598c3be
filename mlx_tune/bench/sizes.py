"""The sizes of the measurements, and the bound that none of them exceeds."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_tune.devices import Backend
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.units import format_bytes

#: The share of `memory_budget` that a measurement may take at the most, whatever its sizes say.
SHARE = 0.5


class LeftOutError(Exception):
    """A measurement that is not made here, and why."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of every measurement.

    Attributes:
        name: As the file of results says it.
        most_bytes: The bound on a section's memory; half of what is free is the other.
        width, blocks, heads, vocabulary: Of the language model that is trained.
        rows, tokens: Of its batch.
        turns: Steps whose least peak is taken, and turns of a comparison of times.
        budget_rows: The rows that the budget of `autobatch` holds.
        step: Blocks, width and rows of the doctor's checkpointed step.
        product_width, product_rows, product_repeats: Of products with packed weights.
        kernels: The number of shapes whose kernels are tried.
        lazy: Width and number of operations of the graph.
        shared_width: Of the array that the processor and the GPU read.
        wired_bytes, idle_seconds: Of the sweep that is wired: weights, and the rest before each.
    """

    name: str
    most_bytes: int
    width: int
    blocks: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int
    turns: int
    budget_rows: int
    step: tuple[int, int, int]
    product_width: int
    product_rows: tuple[int, ...]
    product_repeats: int
    kernels: int
    lazy: tuple[int, int]
    shared_width: int
    wired_bytes: int
    idle_seconds: float


#: For tests: seconds in all on any machine.
TOY = Sizes(
    name="toy", most_bytes=10**8, width=32, blocks=2, heads=2, vocabulary=64, rows=2, tokens=16, turns=2, budget_rows=5,
    step=(2, 32, 256), product_width=128, product_rows=(1, 8), product_repeats=1, kernels=1, lazy=(32, 8),
    shared_width=64, wired_bytes=2**19, idle_seconds=0.0,
)  # fmt: skip

#: By whether there is a GPU, and by whether it should be quick.
_SIZES = {
    (False, True): Sizes(
        name="quick", most_bytes=5 * 10**8, width=96, blocks=4, heads=4, vocabulary=512, rows=4, tokens=64, turns=3,
        budget_rows=7, step=(6, 96, 512), product_width=256, product_rows=(1, 16), product_repeats=2, kernels=2,
        lazy=(128, 50), shared_width=512, wired_bytes=10**8, idle_seconds=0.2,
    ),
    (False, False): Sizes(
        name="full", most_bytes=2 * 10**9, width=192, blocks=6, heads=6, vocabulary=2048, rows=4, tokens=128, turns=5,
        budget_rows=7, step=(8, 128, 1024), product_width=512, product_rows=(1, 16, 64), product_repeats=4, kernels=8,
        lazy=(256, 100), shared_width=1024, wired_bytes=10**9, idle_seconds=1.0,
    ),
    (True, True): Sizes(
        name="quick", most_bytes=10**9, width=256, blocks=6, heads=4, vocabulary=2048, rows=4, tokens=128, turns=3,
        budget_rows=7, step=(6, 512, 2048), product_width=1024, product_rows=(1, 16, 256), product_repeats=8, kernels=2,
        lazy=(512, 50), shared_width=2048, wired_bytes=5 * 10**8, idle_seconds=0.5,
    ),
    (True, False): Sizes(
        name="full", most_bytes=4 * 10**9, width=1024, blocks=8, heads=16, vocabulary=16384, rows=4, tokens=256,
        turns=5, budget_rows=7, step=(8, 1024, 4096), product_width=4096, product_rows=(1, 16, 256, 2048),
        product_repeats=16, kernels=8, lazy=(2048, 100), shared_width=4096, wired_bytes=32 * 10**9, idle_seconds=1.0,
    ),
}  # fmt: skip


def sizes_for(backend: Backend, quick: bool) -> Sizes:
    """The sizes for a backend.

    Examples:
        >>> sizes_for("cpu", True).width < sizes_for("metal", False).width
        True
    """
    return _SIZES[backend != "cpu", quick]


def sizes_named(name: str, backend: Backend) -> Sizes:
    """The sizes that a file of results, or a section's process, names.

    Raises:
        InvalidArgumentError: There are none of that name.
    """
    for sizes in (TOY, sizes_for(backend, True), sizes_for(backend, False)):
        if sizes.name == name:
            return sizes
    raise InvalidArgumentError(f"size {name!r}: there are 'toy', 'quick' and 'full'.")


def room_bytes(sizes: Sizes) -> int:
    """The bytes that a section may take: the bound of its sizes, or half of `memory_budget` where that is less."""
    from mlx_tune.memory import memory_budget

    return min(sizes.most_bytes, memory_budget(SHARE).bytes)


def require(needed_bytes: int, room: int) -> None:
    """Leave a measurement out that would take more than it may.

    Args:
        needed_bytes: Its predicted peak.
        room: The bytes that it may take.

    Raises:
        LeftOutError: It is too large.
    """
    if needed_bytes > room:
        raise LeftOutError(f"it needs {format_bytes(needed_bytes)}, and {format_bytes(room)} are safe to take here")
