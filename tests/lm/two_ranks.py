"""What each of two ranks does in `test_two_ranks.py`; run by `mlx.launch`, and alone for the one rank to compare with.

Arguments: a folder, and "train" or "search".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs
from toy_models import CONFIGS, build_model

from mlx_tune import lm


def main(folder: Path, task: str) -> None:
    world = mx.distributed.init()
    model = build_model(CONFIGS["tied"])
    model.set_dtype(mx.float32)
    lm.add_adapters(model, "lora", num_layers=3, lora_parameters={"rank": 4, "scale": 10.0, "dropout": 0.0})
    # Rows of one length, so that the mean of the ranks' means is the mean.
    rows = [([(7 * i + j) % 320 for j in range(40)], 0) for i in range(16)]
    name = f"{task}-{world.rank()}-of-{world.size()}"
    args = TrainingArgs(batch_size=4, iters=6, steps_per_report=3, adapter_file=folder / name / "adapters.safetensors")
    np.random.seed(0)
    if task == "search":
        # One rank has less memory than the other.
        budget = 40_000_000 if world.rank() else 12_000_000
        result = lm.autobatch(model, rows, args, budget=budget, max_batch=8, progress=False)
        answer = {"batch_size": result.batch_size}
    else:
        result = lm.train(model, optim.SGD(1e-1), rows, rows[:8], args)
        answer = {"ranks": result.ranks, "tokens": result.tokens, "losses": [line.loss for line in result.losses]}
    mx.savez(str(folder / f"{name}.npz"), **dict(tree_flatten(model.trainable_parameters())))
    (folder / f"{name}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
