"""Find the largest batch for a small convolutional network, then train with it.

Run it with `python examples/batch_finder.py`, or give it a budget: `python examples/batch_finder.py 200MB`.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import mlx_tune as mt


class ConvNet(nn.Module):
    """Three convolutions and a linear head, for 32 x 32 pictures in ten classes."""

    def __init__(self):
        super().__init__()
        self.convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 32), (32, 32))]
        self.pool = nn.MaxPool2d(2, 2)
        self.head = nn.Linear(32, 10)

    def __call__(self, pictures):
        x = pictures
        for convolution in self.convolutions:
            x = self.pool(nn.relu(convolution(x)))
        return self.head(x.mean(axis=(1, 2)))


def main(budget: str) -> None:
    mx.random.seed(0)
    model, optimizer = ConvNet(), optim.AdamW(1e-3)

    def loss_of(model, pictures, labels):
        return nn.losses.cross_entropy(model(pictures), labels, reduction="mean")

    value_and_grad = nn.value_and_grad(model, loss_of)

    def step(batch):
        loss, gradients = value_and_grad(model, *batch)
        optimizer.update(model, gradients)
        return loss

    def make_batch(n):  # bright pictures are class 1, dark ones class 0
        labels = mx.random.randint(0, 2, (n,))
        return mx.random.normal((n, 32, 32, 3)) + labels[:, None, None, None], labels

    result = mt.autobatch(step, make_batch, budget=budget, max_batch=512, state=(model, optimizer))
    print(result)

    with result.applied():
        for i in range(5):
            loss = step(make_batch(result.batch_size))
            mx.eval(loss, model.parameters(), optimizer.state)
            print(f"step {i}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "60MB")
