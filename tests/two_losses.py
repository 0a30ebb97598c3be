"""A training step that comes with the plain loss and with the linear one, and machines on which one is faster."""

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_tune import checkpoint, is_checkpointed, linear_cross_entropy, uncheckpoint
from mlx_tune.graphs import estimate_memory
from mlx_tune.measuring.step import StepTrial

WIDTH, VOCABULARY, LENGTH, BLOCKS = 16, 600, 64, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def __call__(self, x):
        return x + self.down(nn.relu(self.up(x)))


class Speaker(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = [Block() for _ in range(BLOCKS)]

    def states(self, tokens):
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class Training:
    """The model, and its two steps on rows of tokens."""

    def __init__(self):
        mx.random.seed(0)
        self.model, self.optimizer = Speaker(), optim.SGD(0.1)
        mx.eval(self.model.parameters())

        def plain(model, tokens):
            logits = model.head(model.states(tokens))
            return nn.losses.cross_entropy(logits, tokens, reduction="mean")

        def linear(model, tokens):
            return linear_cross_entropy(model.states(tokens), model.head, tokens)

        self.step, self.linear_step = self._step(plain), self._step(linear)

    def searched(self, search, budget, **options):
        """What `plan_checkpoints` or `autofit` finds with both losses, in so many bytes beside what others hold."""
        return search(
            self.model,
            self.step,
            self.make_batch,
            budget=budget + self.beside(),
            state=self.optimizer,
            linear_step=self.linear_step,
            progress=False,
            **options,
        )

    def _step(self, loss):
        gradient = nn.value_and_grad(self.model, loss)

        def step(tokens):
            value, gradients = gradient(self.model, tokens)
            self.optimizer.update(self.model, gradients)
            return value

        return step

    @staticmethod
    def make_batch(n):
        return mx.zeros((n, LENGTH), dtype=mx.int32)

    def floor(self, choice, n):
        """The floor of a choice: blocks, and at the end the loss."""
        *blocks, linear = choice
        for layer, yes in zip(self.model.layers, blocks, strict=True):
            if yes:
                checkpoint(layer)
        try:
            step = self.linear_step if linear else self.step
            return estimate_memory(step, self.make_batch(n), state=(self.model, self.optimizer)).floor_bytes
        finally:
            uncheckpoint(self.model)

    def beside(self):
        gc.collect()
        return max(0, mx.get_active_memory() - sum(a.nbytes for _, a in tree_flatten(self.model.parameters())))

    def everything(self):
        values = [(name, value.tolist()) for name, value in tree_flatten(self.model.parameters())]
        return values, mx.random.state[0].tolist(), [type(m) for m in self.model.modules()]


class Machine:
    """Steps of `fixed + n * (row + again * checkpointed blocks + linear * linear loss)` seconds at their floor."""

    def __init__(self, monkeypatch, training, *, fixed=0.0, row=1.0, again=0.1, linear=0.1):
        import mlx_tune.checkpointing.planning.measure as measuring
        import mlx_tune.checkpointing.planning.survey as surveying

        self.training, self.fixed, self.row, self.again, self.linear = training, fixed, row, again, linear
        self.runs = []
        monkeypatch.setattr(measuring, "run_step", self.run_step)
        monkeypatch.setattr(surveying, "forward_seconds", self.forward_seconds)

    def forward_seconds(self, path, block, calls):
        return calls.inputs[0][0][0].shape[0] * self.again

    def seconds(self, n, choice):
        *blocks, linear = choice
        return self.fixed + n * (self.row + self.again * sum(blocks) + self.linear * linear)

    def run_step(self, step, args, state=(), limit_bytes=None):
        n, blocks = args[0].shape[0], tuple(map(is_checkpointed, self.training.model.layers))
        floor = estimate_memory(step, *args, state=state).floor_bytes + self.training.beside()
        choice = (*blocks, step is self.training.linear_step)
        self.runs.append((n, choice, limit_bytes))
        return StepTrial(limit_bytes, floor, self.seconds(n, choice))
