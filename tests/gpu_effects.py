"""One operation on a GPU: the bytes that it takes and the kernels that it launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from mlx_tune.graphs.backends import rounded, rules_of
from mlx_tune.graphs.graph import Graph, Node, Value
from mlx_tune.graphs.simulating.allocator import Allocator
from mlx_tune.graphs.simulating.layouts import Layout
from mlx_tune.graphs.simulating.timeline import effects_of

Shape = tuple[int, ...]


def run(
    backend: str,
    name: str,
    inputs: Sequence[Shape],
    outputs: Sequence[Shape],
    *,
    layouts: Sequence[Layout | None] = (),
    dtypes: Sequence[mx.Dtype] = (),
    arguments: tuple[object, ...] = (),
    donated: Sequence[int] = (),
) -> tuple[Allocator, int, int]:
    """Follow one operation.

    Args:
        backend: The backend.
        name: The primitive.
        inputs: Shapes of what it reads; bfloat16 unless `dtypes` says otherwise, for outputs as well.
        outputs: Shapes of what it makes.
        layouts: Of the inputs, where they do not lie in rows.
        dtypes: Of inputs and then outputs.
        arguments: The primitive's arguments.
        donated: The inputs that nothing else needs.

    Returns:
        The buffers afterwards, the bytes taken while it runs, and the kernels.
    """
    shapes = [*inputs, *outputs]
    kinds = [*dtypes, *[mx.bfloat16] * (len(shapes) - len(dtypes))]
    values = [Value(shape, dtype) for shape, dtype in zip(shapes, kinds, strict=True)]
    node = Node(name, tuple(range(len(inputs))), tuple(range(len(inputs), len(shapes))), arguments)
    rules = rules_of(backend)
    references = [1 if value in donated else 2 for value in range(len(shapes))]
    m = Allocator(Graph(values, [node]), [0], rounded=partial(rounded, rules), references=references)
    for value in node.inputs:
        m.allocate(value)
    for value, layout in enumerate(layouts):
        m.layout[value] = layout or m.layout[value]
    before, m.launches = m.live, 0
    effects_of(rules)[name](m, node)
    return m, m.live - before, m.launches
