"""What each of two ranks does in `test_two_ranks.py`; run by `mlx.launch`, and alone for the one rank to compare with.

Arguments: a folder, and "train" or "search".
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs
from toy_models import CONFIGS, build_model

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.quantization.learning.dwq import train_dwq
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel


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
        options = {"budget": budget, "max_batch": 4, "progress": False}
        result = lm.autobatch(model, rows, args, **options)
        fit = lm.autofit(model, rows, args, target_batch=4, steps=1, **options)
        try:
            lm.plan_checkpoints(model, rows, args, budget=budget, progress=False)
        except mt.InvalidArgumentError as error:
            refusal = str(error)
        answer = {
            "batch_size": result.batch_size,
            "fit": [fit.batch_size, fit.accumulation_steps, list(fit.paths), fit.limit_bytes, fit.budget_bytes],
            "refusal": refusal,
        }
    else:
        result = lm.train(model, optim.SGD(1e-1), rows, rows[:8], args)
        answer = {"ranks": result.ranks, "tokens": result.tokens, "losses": [line.loss for line in result.losses]}
        answer |= calibrate(folder / f"{name}-dwq.npz")
    mx.savez(str(folder / f"{name}.npz"), **dict(tree_flatten(model.trainable_parameters())))
    (folder / f"{name}.json").write_text(json.dumps(answer))


def calibrate(file: Path) -> dict[str, object]:
    """Train scales and biases on calibration that ranks share: steps of three sequences, which two cannot halve."""
    reference = build_model(CONFIGS["tied"])
    reference.set_dtype(mx.float32)
    model = copy.deepcopy(reference)
    nn.quantize(model, 64, 3)
    tokens = (mx.arange(24 * 40) * 7919 % 320).reshape(24, 40)
    batches = read_batches([tokens[i : i + 3] for i in range(0, 24, 3)], "calibration")
    result = train_dwq(WalkedModel(model), reference, batches, epochs=2, progress=False)
    grids = {path: value for path, value in tree_flatten(model.parameters()) if path.endswith(("scales", "biases"))}
    mx.savez(str(file), **grids)
    return {"dwq": [result.loss_before, result.loss_after, result.rate, result.steps], "dwq_ranks": result.ranks}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
