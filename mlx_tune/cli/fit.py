"""`mlx-tune fit`: checkpoints, batch, accumulation and limit together, for the most tokens a second."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_tune.cli.arguments import make_parser
from mlx_tune.cli.fine_tuning import add_budget, add_fine_tuning
from mlx_tune.cli.search import search_and_print

if TYPE_CHECKING:
    from mlx_tune.fitting.result import Fit
    from mlx_tune.lm.preparation import FineTuning

_EXAMPLES = """\
  mlx-tune fit --model models/mine --data data/
  mlx-tune fit --model models/mine --data data/ --memory-budget 24GB \\
      --target-batch 64
  mlx-tune fit --model models/mine --max-seq-length 4096 --json > fit.json"""


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `fit` and its options."""
    parser = make_parser(
        subparsers,
        "fit",
        "choose checkpoints, batch, accumulation and limit together, for the most tokens a second",
        description="Choose which blocks to checkpoint, the batch, its accumulation and the memory limit together, so "
        "that mlx-lm's trainer gets the most tokens a second out of a memory budget. `mlx-tune lora --batch-size auto "
        "--grad-checkpoint auto` does the same and then trains. The exit code is 1 where not even one row fits.",
        examples=_EXAMPLES,
    )
    add_fine_tuning(parser, batch=False, checkpoint=False)
    add_budget(parser)
    parser.add_argument("--target-batch", type=int, metavar="N", help="rows that make up an update of the optimizer")
    parser.add_argument("--max-batch", type=int, metavar="N", help="the largest batch to consider")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="X",
        help="of settings within this share of the best rate the one with the lowest peak wins (default: 0.01)",
    )
    parser.add_argument(
        "--throttle",
        action=argparse.BooleanOptionalAction,
        help="let the memory limit be below the budget, so that MLX waits instead of running ahead (default: yes, "
        "except on Metal)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw rate against memory into an .svg or .png file")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Search and print the choice. Returns 1 where nothing fits, else 0."""
    from mlx_tune.lm.fitting import autofit

    def find(ready: FineTuning) -> Fit:
        return autofit(
            ready.model,
            ready.train_set,
            ready.args,
            optimizer=ready.optimizer,
            valid_set=ready.valid_set,
            plain_loss=ready.plain_loss,
            budget=arguments.memory_budget,
            target_batch=arguments.target_batch,
            max_batch=arguments.max_batch,
            tolerance=arguments.tolerance,
            throttle=arguments.throttle,
        )

    return search_and_print(arguments, find, trains_with=["--batch-size", "auto", "--grad-checkpoint", "auto"])
