"""How long an estimate takes as a model grows, and what a search for the batch costs, in steps of the same model.

python tests/benchmarks/estimate_growth.py [--layers N ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import mlx_tune as mt


class Block(nn.Module):
    """Two linear layers, four arrays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.b(nn.relu(self.a(x)))


class Net(nn.Module):
    """Blocks one after the other."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = [Block(width) for _ in range(layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def training(layers: int, width: int) -> tuple[Callable[[mx.array], mx.array], Any]:
    """A step with AdamW, and its state."""
    model, optimizer = Net(layers, width), optim.AdamW(1e-4)
    gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())

    def step(x: mx.array) -> mx.array:
        loss, grads = gradients(model, x)
        optimizer.update(model, grads)
        return loss

    return step, (model, optimizer)


def seconds(call: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def a_step(step: Callable[[mx.array], mx.array], state: Any, x: mx.array) -> float:
    """Processor seconds of the quickest of some steps."""
    return min(seconds(lambda: mx.eval(step(x), state[0].parameters(), state[1].state)) for _ in range(4))


def estimating(layers: int) -> tuple[float, float]:
    """Seconds of a step and of its estimate."""
    step, state = training(layers, 8)
    x = mx.random.normal((4, 8))
    taken = a_step(step, state, x)
    return taken, min(seconds(lambda: mt.estimate_memory(step, x, state=state)) for _ in range(2))


def searching(width: int, rows: int = 64) -> tuple[float, float]:
    """Seconds of a step at the largest batch and of the search that arrives at it."""
    step, state = training(64, width)

    def search() -> None:
        mt.autobatch(step, lambda n: mx.ones((n, width)), budget="2GB", max_batch=rows, state=state, progress=False)

    search()  # what is imported once
    return a_step(step, state, mx.random.normal((rows, width))), seconds(search)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[50, 200, 800, 1250])
    print("| arrays | a step | an estimate | as many steps |\n| ---: | ---: | ---: | ---: |")
    for layers in parser.parse_args().layers:
        step, estimate = estimating(layers)
        print(f"| {4 * layers:,} | {step:.2f} s | {estimate:.2f} s | {estimate / step:.1f} |", flush=True)
    print("\n| width of 64 layers | a step | autobatch | as many steps |\n| ---: | ---: | ---: | ---: |")
    for width in (8, 256):
        step, search = searching(width)
        print(f"| {width} | {step:.3f} s | {search:.2f} s | {search / step:.0f} |", flush=True)


if __name__ == "__main__":
    main()
