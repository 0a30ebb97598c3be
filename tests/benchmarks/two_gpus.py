"""Two GPUs against one: the same step, the same search, the same calibration.

    python tests/benchmarks/two_gpus.py                                       # one
    mlx.launch -n 2 --backend nccl -- python tests/benchmarks/two_gpus.py     # two; `--backend ring` on a CPU

Each rank prints a line: the losses and a sum over the weights after five steps on the same eight rows, shared between
the ranks; the answer of `autobatch`, of which the second rank has the smaller budget; and the divergence before and
after "dwq" on the same calibration. Two ranks must agree with each other exactly, and with one to rounding.
"""

from __future__ import annotations

import json
import time

import gpu_models
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import mlx_tune as mt

ROWS, LENGTH, STEPS = 8, 65, 5


def weights_sum(model: nn.Module) -> float:
    """One number that depends on every weight, and on the scales and biases of quantized ones."""
    arrays = (array for _, array in tree_flatten(model.parameters()) if array.dtype != mx.uint32)
    return float(sum(mx.abs(array.astype(mx.float32)).sum().item() for array in arrays))


def main() -> None:
    """Run all three on this rank."""
    group = mx.distributed.init()
    rank, size = group.rank(), group.size()
    model = gpu_models.build("tiny")
    model.set_dtype(mx.float32)
    optimizer = optim.SGD(0.1)

    def loss_of(model: nn.Module, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    gradients_of = nn.value_and_grad(model, loss_of)

    def step(tokens: mx.array) -> mx.array:
        loss, gradients = gradients_of(model, tokens)
        optimizer.update(model, nn.average_gradients(gradients))
        return mx.distributed.all_sum(loss) / size

    def make_batch(n: int) -> mx.array:
        return mx.random.randint(0, 1024, (n, LENGTH), key=mx.random.key(7))

    report: dict[str, object] = {"rank": rank, "of": size}
    losses = []
    for _ in range(STEPS):
        loss = step(make_batch(ROWS)[rank::size])
        mx.eval(loss, model.parameters())
        losses.append(loss.item())
    report["losses"], report["weights"] = losses, weights_sum(model)
    budget = mx.get_active_memory() + 300_000_000 * (2 - rank)
    started = time.perf_counter()
    found = mt.autobatch(step, make_batch, budget=budget, max_batch=512, state=(model, optimizer), progress=False)
    report["autobatch"] = [found.batch_size, found.limit_bytes, found.budget_bytes, len(found.trials)]
    report["autobatch_seconds"] = round(time.perf_counter() - started, 1)
    batches = [make_batch(4) for _ in range(2)]
    quantized = mt.quantize_model(model, 3, 64, method="dwq", calibration=batches, evaluation=batches, progress=False)
    report["mean_kl"] = None if quantized.accuracy is None else quantized.accuracy.to_dict()["mean_kl"]
    report["scales"] = weights_sum(model)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
