"""Checkpoint a block of your own: dropout, running statistics and a value worth keeping, verified and measured.

python examples/checkpoint_custom_block.py
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import mlx_tune as mt

WIDTH, DEPTH, BATCH = 128, 8, 512


class MixerBlock(nn.Module):
    """A residual block that mlx-lm has never heard of."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def __call__(self, x):
        hidden = mt.keep(self.up(self.norm(x)), "up")  # worth keeping: a large product
        return x + self.dropout(self.down(nn.gelu(hidden)))


def build():
    mx.random.seed(0)
    model = nn.Sequential(*[MixerBlock() for _ in range(DEPTH)], nn.Linear(WIDTH, 10))
    mx.eval(model.parameters())
    return model


def train(model, steps=5):
    """A few steps; the last loss and the peak."""
    optimizer = optim.SGD(learning_rate=0.05)
    gradient = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y).mean())
    x = mx.random.normal((BATCH, WIDTH), key=mx.random.key(1))
    y = mx.random.randint(0, 10, (BATCH,), key=mx.random.key(2))
    mx.random.seed(3)
    with mt.track_memory() as memory:
        for _ in range(steps):
            loss, grads = gradient(x, y)
            optimizer.update(model, grads)
            mx.eval(loss, model.state)
    return loss.item(), memory.peak_bytes


def main():
    model = build()
    x, y = mx.random.normal((32, WIDTH)), mx.random.randint(0, 10, (32,))
    print(mt.verify_checkpoint(model, lambda x, y: nn.losses.cross_entropy(model(x), y).mean(), x, y), end="\n\n")
    ways = {
        "plain": lambda model: None,
        "every block": mt.checkpoint_blocks,
        "every second": lambda model: mt.checkpoint_blocks(model, every=2),
        "keeping the product": lambda model: mt.checkpoint_blocks(model, keep=["up"]),
    }
    for name, wrap in ways.items():
        model = build()
        wrap(model)
        loss, peak = train(model)
        print(f"{name:20} loss {loss:.6f}  peak {mt.format_bytes(peak)}")


if __name__ == "__main__":
    main()
