"""The training run that `estimate`, `autobatch`, `checkpoint` and `fit` are asked about."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mlx_tune.cli.arguments import add_json, add_model
from mlx_tune.cli.output import check_picture
from mlx_tune.progress import progress_bar

if TYPE_CHECKING:
    from mlx_tune.lm.preparation import FineTuning

#: Options that name no model, data or batch, but say how to train: `mlx-tune lora` takes them as they are.
PASSED_ON = (
    "fine_tune_type",
    "num_layers",
    "optimizer",
    "max_seq_length",
    "grad_accumulation_steps",
    "grad_checkpoint",
    "plain_loss",
    "mask_prompt",
    "seed",
    "trust_remote_code",
    "config",
)

#: Options of the shared set that are settings of mlx-lm by the same name.
_SETTINGS = ("model", "data", "batch_size", *(name for name in PASSED_ON if name != "config"))

#: More stand-in rows than any batch will have.
_STAND_IN_ROWS = 1 << 20


def add_fine_tuning(parser: argparse.ArgumentParser, *, batch: bool, checkpoint: bool) -> None:
    """Add mlx-lm's flags for a training run, as far as memory depends on them.

    Args:
        parser: The subcommand's.
        batch: True where `--batch-size` is asked for, rather than answered.
        checkpoint: The same of `--grad-checkpoint`.
    """
    add_model(parser)
    group = parser.add_argument_group("the training run, in mlx_lm.lora's words")
    group.add_argument(
        "--data", metavar="DIR", help="folder with train.jsonl (default: rows of --max-seq-length tokens stand in)"
    )
    group.add_argument("--fine-tune-type", choices=["lora", "dora", "full"], help="what is trained (default: lora)")
    group.add_argument("--num-layers", type=int, metavar="N", help="blocks to train; -1 for all (default: 16)")
    group.add_argument(
        "--optimizer", choices=["adam", "adamw", "muon", "sgd", "adafactor"], help="the optimizer (default: adam)"
    )
    if batch:
        group.add_argument("--batch-size", type=int, metavar="N", help="rows in a batch (default: 4)")
    group.add_argument("--max-seq-length", type=int, metavar="N", help="longest row, in tokens (default: 2048)")
    group.add_argument(
        "--grad-accumulation-steps", type=int, metavar="N", help="batches to an update of the optimizer (default: 1)"
    )
    if checkpoint:
        group.add_argument(
            "--grad-checkpoint", action="store_true", default=None, help="checkpoint every block of the model"
        )
    add_plain_loss(group)
    group.add_argument("--mask-prompt", action="store_true", default=None, help="leave prompts out of the loss")
    group.add_argument("--seed", type=int, metavar="N", help="seed of adapters and data (default: 0)")
    group.add_argument("-c", "--config", metavar="FILE", help="mlx_lm.lora's YAML file, for what has no flag")
    add_json(parser)


def add_plain_loss(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--plain-loss`."""
    parser.add_argument(
        "--plain-loss",
        action="store_true",
        default=None,
        help="hold the logits of the whole batch, as mlx-lm does (default: of a few tokens at a time, where the model "
        "can be split)",
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """`--memory-budget`."""
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help='memory to stay within, such as 24GB or "80%%" (default: 90 %% of what this machine can give)',
    )


def prepare_run(arguments: argparse.Namespace, *, lazy: bool = False) -> FineTuning:
    """Load what the arguments name.

    Args:
        arguments: With the flags of `add_fine_tuning`.
        lazy: Leave the weights on disk.

    Returns:
        The result of `mlx_tune.lm.prepare`.
    """
    from mlx_tune.lm.preparation import names_data, prepare, read_settings
    from mlx_tune.memory import resolve_budget

    if arguments.memory_budget is not None:
        resolve_budget(arguments.memory_budget)  # a typing error should not cost the time that loading takes
    check_picture(getattr(arguments, "plot", None))
    given = {name: getattr(arguments, name, None) for name in _SETTINGS}
    settings = read_settings({**given, "train": True}, arguments.config)
    with progress_bar(f"loading {arguments.model}"):
        return prepare(settings, lazy=lazy, stand_in_rows=None if names_data(settings) else _STAND_IN_ROWS)
