from __future__ import annotations

import mlx.core as mx

from mlx_tune.graphs import ArraySpec, estimate_memory
from mlx_tune.lm.capacity.tracing import course_of


def test_classes_are_operations_of_one_name_and_shape():
    weights = {"w": mx.ones((8, 8))}

    def step(x):
        for _ in range(3):
            x = mx.exp(x @ weights["w"])
        return x.sum()

    batch = ArraySpec((4, 8), mx.float32)
    course, estimate = (
        course_of(step, (batch,), weights, "metal"),
        estimate_memory(step, batch, state=weights, backend="metal"),
    )
    assert course.peak_bytes == estimate.floor_bytes
    assert course.start_bytes == estimate.start_bytes
    assert [key[0] for key in list(course.highest)[1:]] == list(dict.fromkeys(estimate.operations))
