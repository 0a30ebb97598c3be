"""A training step for which blocks to checkpoint are planned."""

import gc
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_tune import checkpoint
from mlx_tune import plan_checkpoints as plan_checkpoints_with_progress
from mlx_tune.graphs import estimate_memory

plan_checkpoints = partial(plan_checkpoints_with_progress, progress=False)


WIDTH = 32


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def __call__(self, x):
        return x + self.down(self.dropout(nn.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, hidden=(128,) * 5, backwards=False):
        super().__init__()
        self.layers = [Block(h) for h in hidden]
        self.backwards = backwards

    def __call__(self, x):
        for layer in reversed(self.layers) if self.backwards else self.layers:
            x = layer(x)
        return x


class Training:
    """A model with its optimizer, its step and its batches."""

    def __init__(self, model=None, compiled=False):
        mx.random.seed(0)
        self.model = model or Model()
        # Compiling for the CPU runs a C++ compiler on every fused kernel: few of them keep the tests quick.
        self.optimizer = optim.SGD(1e-3) if compiled else optim.Adam(1e-3)
        self.optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.traces = 0
        gradient = nn.value_and_grad(self.model, lambda model, x: model(x).square().mean())

        def step(x):
            self.traces += 1
            loss, gradients = gradient(self.model, x)
            self.optimizer.update(self.model, gradients)
            return loss

        state = [self.model.state, self.optimizer.state, mx.random.state]
        self.step = mx.compile(step, inputs=state, outputs=state) if compiled else step

    @property
    def state(self):
        return self.model, self.optimizer

    @staticmethod
    def make_batch(n):
        return mx.sin(mx.arange(n * WIDTH, dtype=mx.float32)).reshape(n, WIDTH)

    def floor(self, checkpointed, n=256):
        for layer, yes in zip(self.model.layers, checkpointed, strict=True):
            if yes:
                checkpoint(layer)
        try:
            return estimate_memory(self.step, self.make_batch(n), state=self.state).floor_bytes
        finally:
            from mlx_tune import uncheckpoint

            uncheckpoint(self.model)

    def everything(self):
        flat = tree_flatten(self.model.parameters()) + tree_flatten(self.optimizer.state)
        values = {name: value.tolist() for name, value in flat}
        return values, mx.random.state[0].tolist(), [type(m) for m in self.model.modules()], sorted(self.model)

    def plan(self, budget, n=256, **options):
        return plan_checkpoints(
            self.model,
            self.step,
            self.make_batch,
            batch_size=n,
            budget=budget + self.beside(),
            state=self.optimizer,
            **options,
        )

    def beside(self):
        """What other tests left in memory."""
        gc.collect()
        held = sum({id(a): a.nbytes for _, a in tree_flatten([self.model.parameters(), self.optimizer.state])}.values())
        return max(0, mx.get_active_memory() - held)


def between(floors, share):
    plain, everything = floors
    return int(everything + share * (plain - everything))
