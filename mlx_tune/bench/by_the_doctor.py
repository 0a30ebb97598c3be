"""Measuring with the doctor's own measurements, at these sizes."""

from __future__ import annotations

from typing import cast

from mlx_tune.bench.sizes import LeftOutError, Sizes, require
from mlx_tune.diagnosis.check import Finding
from mlx_tune.diagnosis.checks import bench, kernels
from mlx_tune.presentation.plain import Json
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.wiring.limits import read_capacity

#: The least that a sweep is made of: 256 x 256 in float16.
_ONE_WEIGHT = 2 * 256 * 256
#: Kernels are tried with no more outputs than this, of however many a shape has.
_OUTPUTS = 4352


def checkpointed_step(sizes: Sizes, room: int) -> dict[str, Json]:
    """Peak and time of a step with plain and with checkpointed blocks, both held back.

    Args:
        sizes: Blocks, width and rows.
        room: The bytes that it may take.
    """
    blocks, width, rows = sizes.step
    # Float32: weights and their gradients, and for each block what two layers and an activation hold.
    require(4 * blocks * (2 * 8 * width * width + 3 * 4 * rows * width), room)
    return _figures(bench.checkpointed_step.function(blocks=blocks, width=width, rows=rows))


def right_kernels(sizes: Sizes, room: int) -> dict[str, Json]:
    """The faults of kernels in the shapes of common models: the first so many of the doctor's.

    Args:
        sizes: The number of shapes.
        room: The bytes that it may take.
    """
    shapes = kernels.SHAPES[: sizes.kernels]
    # Two matrices of a stack at the most, in float32 and packed, on either side of the comparison.
    packed = (Format(*wanted).nbytes(2 * shape[-1] * min(shape[-2], _OUTPUTS), 4) for _, shape, wanted in shapes)
    require(4 * max(packed), room)
    return _figures(kernels.quantized_kernels.function(shapes=shapes))


def wired_sweep(sizes: Sizes, room: int) -> dict[str, Json]:
    """The gain of wiring: at most half of what may be wired, and half of what is free, whatever the sizes say.

    Args:
        sizes: The bytes of weights, and the rest before each sweep.
        room: The bytes that a section may take; more where full sizes wire, since a small sweep shows nothing.
    """
    total = min(sizes.wired_bytes, bench.most_to_wire(0.5, 0.5))
    if not read_capacity().reason:  # which the doctor says better
        require(_ONE_WEIGHT, min(total, room))
    return _figures(bench.wired.function(total_bytes=total, idle_seconds=sizes.idle_seconds))


def lazy_graph(sizes: Sizes, room: int) -> dict[str, Json]:
    """Time and memory of building a graph, and of evaluating it.

    Args:
        sizes: Width of the arrays and number of operations.
        room: The bytes that it may take.
    """
    size, operations = sizes.lazy
    require(4 * size * size * 2 * operations, room)  # if it held every result at once
    return _figures(bench.lazy.function(size=size, operations=operations))


def shared_array(sizes: Sizes, room: int) -> dict[str, Json]:
    """The memory that is added where the processor and the GPU read one array.

    Args:
        sizes: Width of the array.
        room: The bytes that it may take.
    """
    require(3 * 4 * sizes.shared_width**2, room)
    return _figures(bench.unified_memory.function(size=sizes.shared_width))


def _figures(finding: Finding) -> dict[str, Json]:
    if finding.status == "skip":
        raise LeftOutError(finding.summary)
    return cast("dict[str, Json]", finding.figures)
