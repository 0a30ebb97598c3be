"""`mlx-tune estimate`: what a training step needs, without running it."""

from __future__ import annotations

import argparse
import json

from mlx_tune.cli.arguments import make_parser
from mlx_tune.cli.fine_tuning import add_budget, add_fine_tuning, prepare_run
from mlx_tune.cli.output import is_first_rank, print_result, quiet_output, save_plot
from mlx_tune.progress import progress_bar
from mlx_tune.units import format_bytes

_EXAMPLES = """\
  mlx-tune estimate --model models/mine --batch-size 8 --max-seq-length 4096
  mlx-tune estimate --model models/mine --data data/ --fine-tune-type full \\
      --plot memory.svg
  mlx-tune estimate --model models/mine --batch-size 32 \\
      --memory-budget 24GB && echo it fits
  mlx-tune estimate --model models/mine --backend metal --memory-budget 20GB"""


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `estimate` and its options."""
    parser = make_parser(
        subparsers,
        "estimate",
        "predict the memory of a fine-tuning step, and what it is spent on, without running it",
        description="Predict the memory that one step of mlx-lm's trainer needs at the least, and what it is spent on. "
        "No array is evaluated: the model may be larger than this machine. With --memory-budget the exit code is 1 "
        "where the step does not fit.",
        examples=_EXAMPLES,
    )
    add_fine_tuning(parser, batch=True, checkpoint=True)
    add_budget(parser)
    parser.add_argument(
        "--backend",
        choices=("metal", "cuda", "cpu"),
        help="the backend to price the step for, on any machine (default: this machine's)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw memory over the step into an .svg or .png file")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Trace the step and print what it needs. Returns 1 where that is above the budget, else 0."""
    from mlx_tune.lm.fitting import estimate_memory
    from mlx_tune.memory import resolve_budget

    with quiet_output():
        ready = prepare_run(arguments, lazy=True)
        with progress_bar("estimate") as bar:
            bar.update(text="reading the step's graph")
            estimate = estimate_memory(
                ready.model,
                ready.train_set,
                ready.args,
                optimizer=ready.optimizer,
                plain_loss=ready.plain_loss,
                backend=arguments.backend,
            )
        save_plot(estimate, arguments.plot)
    budget = None if arguments.memory_budget is None else resolve_budget(arguments.memory_budget)
    fits = budget is None or estimate.floor_bytes <= budget
    if not is_first_rank():
        return 0 if fits else 1
    if arguments.json:
        verdict = {} if budget is None else {"budget_bytes": int(budget), "fits": fits}
        print(json.dumps({**estimate.to_dict(), **verdict}, indent=2))
        return 0 if fits else 1
    print_result(estimate, as_json=False)
    if budget is not None:
        gap = abs(int(budget) - estimate.floor_bytes)
        word, side = ("fits", "to spare") if fits else ("does not fit", "too much")
        print(f"The step {word} within {format_bytes(budget)}: {format_bytes(gap)} {side}.")
    return 0 if fits else 1
