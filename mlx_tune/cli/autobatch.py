"""`mlx-tune autobatch`: the largest batch that a fine-tuning run can have."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_tune.cli.arguments import make_parser
from mlx_tune.cli.fine_tuning import add_budget, add_fine_tuning
from mlx_tune.cli.search import search_and_print

if TYPE_CHECKING:
    from mlx_tune.batching.result import AutobatchResult
    from mlx_tune.lm.preparation import FineTuning

_EXAMPLES = """\
  mlx-tune autobatch --model models/mine --data data/
  mlx-tune autobatch --model models/mine --data data/ \\
      --memory-budget 24GB --grad-checkpoint
  mlx-tune autobatch --model models/mine --max-seq-length 1024 \\
      --target-batch 64 --json"""


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `autobatch` and its options."""
    parser = make_parser(
        subparsers,
        "autobatch",
        "find the largest batch that a fine-tuning run can have",
        description="Find the largest batch that mlx-lm's trainer can have in a memory budget, by real steps on the "
        "longest batch, coming from below. The exit code is 1 where not even one row fits.",
        examples=_EXAMPLES,
    )
    add_fine_tuning(parser, batch=False, checkpoint=True)
    add_budget(parser)
    parser.add_argument("--max-batch", type=int, metavar="N", help="the largest batch to consider")
    parser.add_argument(
        "--target-batch", type=int, metavar="N", help="rows to an update: answer batch and accumulation that make it"
    )
    parser.add_argument(
        "--slowdown",
        type=float,
        metavar="SHARE",
        help="answer the largest batch that the memory limit slows down by at most this, such as 0.05 (default: any)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw peaks against batch sizes into an .svg or .png file")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Search and print the answer. Returns 1 where nothing fits, else 0."""
    from mlx_tune.lm.fitting import autobatch

    def find(ready: FineTuning) -> AutobatchResult:
        return autobatch(
            ready.model,
            ready.train_set,
            ready.args,
            optimizer=ready.optimizer,
            valid_set=ready.valid_set,
            plain_loss=ready.plain_loss,
            budget=arguments.memory_budget,
            max_batch=arguments.max_batch,
            target_batch=arguments.target_batch,
            slowdown=arguments.slowdown,
        )

    return search_and_print(arguments, find, trains_with=["--batch-size", "largest"])
