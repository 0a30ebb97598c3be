from __future__ import annotations

import queue
import threading

import mlx.core as mx

from mlx_tune.graphs import ArraySpec, estimate_memory, is_tracing


def test_a_checkpoint_made_before_the_trace_is_known_for_one() -> None:
    @mx.checkpoint
    def block(x: mx.array) -> mx.array:
        return mx.sin(mx.exp(mx.tanh(x) * 2) + x) * 0.1

    def step(x: mx.array) -> mx.array:
        def loss(x: mx.array) -> mx.array:
            for _ in range(4):
                x = block(x)
            return x.sum()

        return mx.value_and_grad(loss)(x)

    estimate = estimate_memory(step, ArraySpec((512, 512), mx.float32))
    assert estimate.operations.count("CustomTransforms") == 4
    assert estimate.operations.count("Tanh") == 8


def test_other_threads_keep_mlx_as_it_is() -> None:
    inside, go_on, seen = threading.Event(), threading.Event(), queue.SimpleQueue()

    def step(x: mx.array) -> mx.array:
        seen.put(is_tracing())
        inside.set()
        go_on.wait(10)
        return x.sum()

    originals = mx.checkpoint, mx.gather_mm
    tracer = threading.Thread(target=lambda: estimate_memory(step, ArraySpec((2,), mx.float32)))
    tracer.start()
    assert inside.wait(10)
    assert not is_tracing()
    gradient = mx.grad(mx.checkpoint(lambda x: (x * x).sum()))(mx.array([3.0]))
    assert gradient.tolist() == [6.0]
    go_on.set()
    tracer.join()
    assert seen.get(timeout=10) is True
    assert (mx.checkpoint, mx.gather_mm) == originals
