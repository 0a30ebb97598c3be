"""Find one batch size for several machines; each of them runs its own trials and all end with the same answer.

On one machine, to see it work: `mlx.launch -n 2 --backend ring -- python examples/two_machines.py`.
On two: the same with `--hostfile hosts.json`.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import mlx_tune as mt
from mlx_tune.graphs import is_tracing


def main() -> None:
    group = mx.distributed.init()
    mx.random.seed(0)  # the same weights everywhere
    model, optimizer = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), optim.SGD(0.01)
    value_and_grad = nn.value_and_grad(model, lambda x: (model(x) - x).square().mean())
    mx.eval(model.parameters())
    mx.random.seed(1 + group.rank())  # and other rows on each

    def step(x):
        loss, gradients = value_and_grad(x)
        if not is_tracing():  # MLX cannot describe a sum over machines without running it
            gradients = nn.average_gradients(gradients, group)
        optimizer.update(model, gradients)
        return loss

    def make_batch(n):  # the rows of this machine
        return mx.random.normal((n, 100, 64))

    result = mt.autobatch(
        step, make_batch, budget="6MB", max_batch=64, state=(model, optimizer), group=group, progress=False
    )
    print(f"rank {group.rank()}: {result.batch_size} rows on each of {group.size()} machines")
    with result.applied():
        loss = step(make_batch(result.batch_size))
        mx.eval(loss, model.parameters())
    print(f"rank {group.rank()}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
