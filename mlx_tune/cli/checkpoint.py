"""`mlx-tune checkpoint`: which blocks to checkpoint, or whether checkpointing keeps a model's gradients."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_tune.cli.arguments import make_parser
from mlx_tune.cli.fine_tuning import add_budget, add_fine_tuning
from mlx_tune.cli.search import search_and_print

if TYPE_CHECKING:
    from mlx_tune.checkpointing.planning.checkpoint_plan import CheckpointPlan
    from mlx_tune.checkpointing.verify_report import VerifyReport
    from mlx_tune.lm.preparation import FineTuning

_EXAMPLES = """\
  mlx-tune checkpoint --model models/mine --data data/ --batch-size 16 \\
      --memory-budget 24GB
  mlx-tune checkpoint --model models/mine --verify --batch-size 1 \\
      --max-seq-length 256"""

_EXIT_CODES = {"equal": 0, "different": 1, "not tested": 3}


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `checkpoint` and its options."""
    parser = make_parser(
        subparsers,
        "checkpoint",
        "choose the blocks to checkpoint, or verify a model's gradients under checkpointing",
        description="Choose which blocks to checkpoint so that a batch fits a memory budget and trains fastest. With "
        "--verify, compare gradients with and without checkpointing instead. The exit code is 1 where the batch does "
        "not fit even with every block checkpointed, or where gradients differ, and 3 where no gradient was put to the "
        "test.",
        examples=_EXAMPLES,
    )
    add_fine_tuning(parser, batch=True, checkpoint=False)
    add_budget(parser)
    parser.add_argument("--verify", action="store_true", help="compare gradients with and without checkpointing")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Plan or verify, and print it. Returns 1 for bad news, 3 where no gradient was tested, else 0."""
    from mlx_tune.lm.fitting import plan_checkpoints, verify_checkpoint

    def verify(ready: FineTuning) -> VerifyReport:
        return verify_checkpoint(ready.model, ready.train_set, ready.args)

    if arguments.verify:
        return search_and_print(arguments, verify, code=lambda report: _EXIT_CODES[report.verdict])

    def find(ready: FineTuning) -> CheckpointPlan:
        return plan_checkpoints(
            ready.model,
            ready.train_set,
            ready.args,
            optimizer=ready.optimizer,
            plain_loss=ready.plain_loss,
            budget=arguments.memory_budget,
        )

    size = [] if arguments.batch_size is None else ["--batch-size", str(arguments.batch_size)]
    return search_and_print(arguments, find, trains_with=[*size, "--grad-checkpoint", "auto"])
