"""The cost of a search on models of many small layers, in processor time of the steps that it chooses.

Reading a step's graph takes as long for small layers as for large ones, so toys of many layers are the worst case: what
a search spends on graphs, snapshots and collections is a share of their steps that no real model comes near.

Each model runs in a process of its own: blocks of two linear layers of 8 and of 64 features, and a llama of mlx-lm with
32 features and rows of 32 tokens, all trained with AdamW in float32. Processor time counts, of all threads, since other
work on the machine hardly changes it; the chosen step's is the median of nine after two.

    python tests/benchmarks/autobatch_cost.py [--layers 64] [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

NAMES = ("linear-8", "linear-64", "llama-32")
BUDGETS = {"linear-8": 24e6, "linear-64": 64e6, "llama-32": 64e6}
WARM, STEPS = 2, 9


class Block(nn.Module):
    """Two linear layers beside a residual path."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(features, features), nn.Linear(features, features)

    def __call__(self, x: mx.array) -> mx.array:
        """Add what the layers make of `x`."""
        return x + self.b(nn.relu(self.a(x)))


def build(name: str, layers: int) -> tuple[Any, Any, Any]:
    """Step, make_batch and state."""
    mx.random.seed(0)
    kind, features = name.split("-")
    size = int(features)
    model: nn.Module
    if kind == "llama":
        from mlx_lm.models import llama

        model = llama.Model(
            llama.ModelArgs(
                model_type="llama",
                hidden_size=size,
                num_hidden_layers=layers,
                intermediate_size=2 * size,
                num_attention_heads=2,
                num_key_value_heads=2,
                rms_norm_eps=1e-5,
                vocab_size=128,
            )
        )
    else:
        model = nn.Sequential(*(Block(size) for _ in range(layers)))
    optimizer = optim.AdamW(1e-4)
    mx.eval(model.parameters())

    def loss(model: Any, x: mx.array) -> mx.array:
        if kind == "llama":
            return nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:]).mean()
        return model(x).square().mean()

    grad = nn.value_and_grad(model, loss)

    def step(x: mx.array) -> mx.array:
        value, gradients = grad(model, x)
        optimizer.update(model, gradients)
        return value

    def make_batch(n: int) -> mx.array:
        return mx.random.randint(0, 128, (n, 33)) if kind == "llama" else mx.ones((n, size))

    return step, make_batch, (model, optimizer)


def measure(name: str, layers: int) -> dict[str, Any]:
    """Search, and then take the chosen steps."""
    from mlx_tune import autobatch
    from mlx_tune.batching.probe import Probe
    from mlx_tune.graphs import estimate

    step, make_batch, state = build(name, layers)
    follow, run = estimate.follow_step, Probe._step_once
    spent = {"graphs": [], "steps": []}

    def timed(what: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            started = time.process_time()
            out = function(*args)
            spent[what].append(time.process_time() - started)
            return out

        return call

    estimate.follow_step, Probe._step_once = timed("graphs", follow), timed("steps", run)
    started = time.process_time()
    result = autobatch(step, make_batch, budget=BUDGETS[name], state=state, progress=False)
    seconds = time.process_time() - started
    batch, taken = make_batch(result.batch_size), []
    mx.eval(batch)
    with result.applied():
        for _ in range(WARM + STEPS):
            started = time.process_time()
            mx.eval(step(batch), state[0].parameters(), state[1].state)
            taken.append(time.process_time() - started)
    one = median(taken[WARM:])
    return {
        "name": name,
        "layers": layers,
        "batch": result.batch_size,
        "step_seconds": one,
        "search_steps": seconds / one,
        "graphs": len(spent["graphs"]),
        "graph_steps": sum(spent["graphs"]) / one,
        "ran": len(spent["steps"]),
        "ran_steps": sum(spent["steps"]) / one,
    }


def main() -> None:
    """Measure every model in a child process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64, help="blocks of each model (default: 64)")
    parser.add_argument("--only", nargs="+", default=NAMES, help="these models")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.layers)))
        return
    from mlx_tune.presentation.tables import render_table

    rows = []
    for name in arguments.only:
        command = [sys.executable, __file__, "--layers", str(arguments.layers), "--child", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = [
        [
            row["name"],
            row["batch"],
            f"{1e3 * row['step_seconds']:.0f} ms",
            f"{row['search_steps']:.1f}",
            row["graphs"],
            f"{row['graph_steps']:.1f}",
            row["ran"],
            f"{row['ran_steps']:.1f}",
        ]
        for row in rows
    ]
    columns = ["model", "batch", "step", "search, in steps", "graphs", "in steps", "steps run", "in steps"]
    print(render_table(columns, table, notes=["Processor time of all threads."]))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
