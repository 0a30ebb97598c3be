"""`mlx-tune lora`: `mlx_lm.lora`, with what is hard to choose by hand chosen by measurement."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_tune.cli.arguments import Subcommand, make_parser
from mlx_tune.cli.fine_tuning import add_plain_loss
from mlx_tune.cli.output import (
    check_place,
    command_lines,
    folded,
    is_first_rank,
    print_too_large,
    quiet_output,
    write_whole,
)
from mlx_tune.errors import BudgetError, InvalidArgumentError
from mlx_tune.progress import progress_bar
from mlx_tune.units import format_limit

if TYPE_CHECKING:
    from mlx_tune.batching.result import AutobatchResult
    from mlx_tune.checkpointing.planning.checkpoint_plan import CheckpointPlan
    from mlx_tune.fitting.result import Fit
    from mlx_tune.lm.lengths.result import LongestSequence
    from mlx_tune.lm.preparation import FineTuning
    from mlx_tune.lm.training_result import TrainingResult

_EXAMPLES = """\
  mlx-tune lora --model models/mine --data data/ --train --batch-size auto
  mlx-tune lora --model models/mine --data data/ --train --batch-size auto \\
      --grad-checkpoint auto --memory-budget 24GB
  mlx-tune lora --config lora.yaml --batch-size auto --target-batch 64
  mlx.launch -n 2 mlx-tune lora --model models/mine --data data/ --train \\
      --batch-size auto"""


#: What may stand in place of a batch size.
_SEARCHES = ("auto", "largest")


class _Parser(Subcommand):
    """Takes what is ours, and leaves the rest to mlx-lm's own parser.

    mlx-lm is imported when the command is used and not before: that takes seconds, and other commands have to work
    where it is broken.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse both sets of options into one namespace."""
        from mlx_tune.lm.lora import lora_parser

        own, rest = argparse.ArgumentParser.parse_known_args(self, args, namespace)
        theirs = lora_parser(self.prog)
        theirs.error = self.error  # type: ignore[method-assign]  # with this command's usage, which has both
        theirs.parse_args(rest, own)
        own.passed_on = rest
        return own, []

    def format_usage(self) -> str:
        """Our usage, and where the rest is listed."""
        return f"{super().format_usage()}  with every option of mlx_lm.lora; {self.prog} --help lists them\n"

    def format_help(self) -> str:
        """Our help, then mlx-lm's options."""
        from mlx_tune.lm.lora import lora_parser

        theirs = lora_parser(self.prog, without=self._option_string_actions).format_help()
        options = theirs[theirs.index("options:") :].replace("options:", "mlx_lm.lora's own options:", 1)
        head, _, examples = super().format_help().partition("examples:\n")
        return f"{head}{options}\nexamples:\n{examples}"


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `lora` and its options."""
    parser = make_parser(
        subparsers,
        "lora",
        "fine-tune as mlx_lm.lora does, with batch, checkpoints and limit chosen by measurement",
        description="Fine-tune with mlx-lm's own trainer. Every option and configuration file of mlx_lm.lora works "
        "here; the options below take `auto` besides. The choice is printed before the training starts, with "
        "the plain mlx_lm.lora command that comes nearest to it. The exit code is 1 where not even one row fits.",
        examples=_EXAMPLES,
    )
    parser.__class__ = _Parser
    parser.allow_abbrev = False
    parser.add_argument(
        "--batch-size",
        type=_count_or_word,
        metavar="N|auto|largest",
        help="rows in a batch; auto takes the one that trains the most tokens a second, largest the largest that fits "
        "(default: 4)",
    )
    parser.add_argument(
        "--grad-checkpoint",
        nargs="?",
        const="on",
        choices=["on", "off", "auto"],
        help="checkpoint every block; auto chooses none, some or all for the most tokens a second (default: off)",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help='memory that auto stays within, such as 24GB or "80%%" (default: 90 %% of what this machine can give)',
    )
    parser.add_argument(
        "--target-batch", type=int, metavar="N", help="rows that make up an update; auto chooses batch x accumulation"
    )
    parser.add_argument(
        "--max-seq-length",
        type=_length,
        metavar="N|auto",
        help="tokens of a row at the most; auto takes the longest that fits, with checkpoints and tiles where they are "
        "needed (default: 2048)",
    )
    add_plain_loss(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return parser


def _count_or_word(text: str) -> int | str:
    if text in _SEARCHES:
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor auto nor largest")


def _length(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def run(arguments: argparse.Namespace) -> int:
    """Choose, train, test. Returns 1 where nothing fits, else 0."""
    from mlx_tune.lm.lora import test_loss
    from mlx_tune.lm.preparation import prepare, read_settings

    settings = _settings(arguments, read_settings)
    say = partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    with quiet_output(arguments.json):
        if not (settings["train"] or settings["test"]):
            raise InvalidArgumentError("Nothing to do: give --train, --test or both.")
        if settings["train"]:
            check_place("--adapter-path", Path(settings["adapter_path"]) / "adapters.safetensors")
        with progress_bar(f"loading {settings['model']}"):
            ready = prepare({**settings, **_numbers(settings)}, adapters=bool(settings["train"]))
        result = None
        if settings["train"]:
            try:
                result = _train(ready, settings, arguments, say)
            except BudgetError as error:
                print_too_large(error, arguments)
                return 1
        loss = None
        if settings["test"]:
            batch_size = ready.args.batch_size if result is None else result.batch_size
            loss = test_loss(ready, batch_size, trained=result is not None)
        if loss is not None and is_first_rank():
            say(f"Test loss {loss:.3f}, perplexity {math.exp(loss):.3f}.")
    if is_first_rank():
        if arguments.json:
            figures = {} if result is None else result.to_dict()
            print(json.dumps(figures | ({} if loss is None else {"test_loss": loss}), indent=2))
        elif result is not None:
            print(f"\n{folded(result)}")
    return 0


def _settings(arguments: argparse.Namespace, read_settings: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """mlx-lm's settings and ours, from flags, file and defaults."""
    from mlx_tune.memory import resolve_budget

    ours = {"json", "command", "passed_on", "config"}
    given = {name: value for name, value in vars(arguments).items() if name not in ours}
    if given["grad_checkpoint"] is not None:
        given["grad_checkpoint"] = {"on": True, "off": False, "auto": "auto"}[given["grad_checkpoint"]]
    settings: dict[str, Any] = {"memory_budget": None, "target_batch": None}
    settings |= read_settings(given, arguments.config)
    batch, checkpoint = settings["batch_size"], settings["grad_checkpoint"]
    length = settings["max_seq_length"]
    asked = (("batch_size", batch, _SEARCHES), ("grad_checkpoint", checkpoint, ("auto",)))
    for name, value, words in (*asked, ("max_seq_length", length, ("auto",))):
        if isinstance(value, str) and value not in words:
            raise InvalidArgumentError(f"{name}: {value!r} in the configuration file is not {' or '.join(words)}.")
    if length == "auto" and (batch in _SEARCHES or checkpoint == "auto" or _ranks() > 1):
        raise InvalidArgumentError(
            "--max-seq-length auto goes with a batch size that is given, on one machine; it chooses checkpoints itself."
        )
    if settings["memory_budget"] is not None:
        if batch not in _SEARCHES and "auto" not in (checkpoint, length):
            raise InvalidArgumentError(
                "--memory-budget has nothing to decide: give --batch-size auto, --grad-checkpoint auto or both, or "
                "--max-seq-length auto."
            )
        resolve_budget(settings["memory_budget"])  # a typing error should not cost the time that loading takes
    if settings["target_batch"] is not None and batch not in _SEARCHES:
        raise InvalidArgumentError("--target-batch is what --batch-size auto aims at: give both.")
    if batch == "largest" and checkpoint == "auto":
        raise InvalidArgumentError(
            "--grad-checkpoint auto goes by speed and --batch-size largest by size: give --batch-size auto, or "
            "--grad-checkpoint on, which makes room for the largest batch."
        )
    return settings


def _numbers(settings: dict[str, object]) -> dict[str, object]:
    """Values for mlx-lm's arguments until the search has found them."""
    return {
        "batch_size": _ranks() if settings["batch_size"] in _SEARCHES else settings["batch_size"],
        "grad_checkpoint": settings["grad_checkpoint"] is True,
        # Any length does until the longest is known.
        "max_seq_length": 2048 if settings["max_seq_length"] == "auto" else settings["max_seq_length"],
    }


def _train(
    ready: FineTuning, settings: dict[str, Any], arguments: argparse.Namespace, say: Callable[[str], object]
) -> TrainingResult:
    """Choose what is left to choose, say it, and train."""
    from mlx_lm.tuner.utils import print_trainable_parameters

    from mlx_tune.lm.lengths.truncation import truncation
    from mlx_tune.lm.lora import check_reporting, reporting_callback
    from mlx_tune.lm.losses.next_token import choose_loss
    from mlx_tune.lm.training import train

    check_reporting(settings)
    print_trainable_parameters(ready.model)
    fit = _choose(ready, settings)
    loss = choose_loss(ready.model, plain=ready.plain_loss, fit=fit)
    length = getattr(fit, "max_seq_length", ready.args.max_seq_length)
    for name, rows in (("training", ready.train_set), ("validation", ready.valid_set)):
        cut = truncation(rows, length) if rows else None
        if cut is not None and cut.cut_rows and is_first_rank():
            say(f"Of the {name} rows, {cut}.")
    final = {**ready.settings, "lora_parameters": _lora_parameters(ready.settings)}
    if fit is not None:
        final["batch_size"] = fit.batch_size
        final["max_seq_length"] = length
        final["grad_accumulation_steps"] = getattr(fit, "accumulation_steps", settings["grad_accumulation_steps"])
    if is_first_rank():
        if fit is not None:
            say(f"{folded(fit)}\n")
        say(_equivalent(final, fit, settings, arguments.passed_on, linear=loss.linear) + "\n")
        folder = Path(settings["adapter_path"])
        write_whole(folder / "adapter_config.json", json.dumps(_plain(final), indent=4, sort_keys=True) + "\n")
    callback = reporting_callback(_plain(final))
    return train(
        ready.model,
        ready.optimizer,
        ready.train_set,
        ready.valid_set,
        ready.args,
        fit=fit,
        plain_loss=ready.plain_loss,
        training_callback=callback,
    )


def _choose(
    ready: FineTuning, settings: dict[str, Any]
) -> Fit | AutobatchResult | CheckpointPlan | LongestSequence | None:
    """The search that belongs to what was left to us; None where nothing was."""
    from mlx_tune.lm.fitting import autobatch, autofit, plan_checkpoints
    from mlx_tune.lm.lengths.longest_sequence import longest_sequence

    batch, checkpoint = settings["batch_size"], settings["grad_checkpoint"]
    shared: dict[str, Any] = {
        "optimizer": ready.optimizer,
        "budget": settings["memory_budget"],
        "plain_loss": ready.plain_loss,
    }
    sizes: dict[str, Any] = {"valid_set": ready.valid_set, "target_batch": settings["target_batch"]}
    if settings["max_seq_length"] == "auto":
        return longest_sequence(ready.model, ready.train_set, ready.args, **shared)
    if batch == "largest":
        return autobatch(ready.model, ready.train_set, ready.args, **sizes, **shared)
    if batch == "auto":
        sizes["checkpoint"] = checkpoint == "auto"
        return autofit(ready.model, ready.train_set, ready.args, **sizes, **shared)
    if checkpoint == "auto" and _ranks() > 1:  # a plan is made on one machine; a fit of this one batch on all
        sizes |= {"min_batch": batch, "max_batch": batch}
        return autofit(ready.model, ready.train_set, ready.args, **sizes, **shared)
    if checkpoint == "auto":
        return plan_checkpoints(ready.model, ready.train_set, ready.args, **shared)
    return None


def _lora_parameters(settings: dict[str, object]) -> object:
    return None if settings["fine_tune_type"] == "full" else settings["lora_parameters"]


def _plain(settings: dict[str, object]) -> dict[str, object]:
    """Settings as JSON can hold them."""
    return {
        k: v if isinstance(v, (str, int, float, bool, list, dict, type(None))) else str(v) for k, v in settings.items()
    }


def _equivalent(
    final: dict[str, Any], fit: object, settings: dict[str, object], typed: Sequence[str], *, linear: bool
) -> str:
    """The plain command that comes nearest, and what it cannot say."""
    lines: list[str] = []
    words = ["mlx_lm.lora", *typed, "--batch-size", str(final["batch_size"])]
    if final["grad_accumulation_steps"] > 1 and "--grad-accumulation-steps" not in typed:
        words += ["--grad-accumulation-steps", str(final["grad_accumulation_steps"])]
    if settings["max_seq_length"] == "auto":
        words += ["--max-seq-length", str(final["max_seq_length"])]
    if "--num-layers" not in typed:
        words += ["--num-layers", str(final["num_layers"])]
    paths = checkpointed_paths(fit)
    way = getattr(fit, "way", None)
    if way is not None and way.checkpoint and settings["grad_checkpoint"] is not True:
        words.append("--grad-checkpoint")
    if way is not None and way.tokens is not None:
        lines.append(f"  (it runs MLPs on whole rows; here they take {way.tokens:,} tokens at a time)")
    if settings["grad_checkpoint"] is True or paths:
        words.append("--grad-checkpoint")
    command = command_lines(words)
    if paths:
        lines.append(f"  (it checkpoints every block; here {len(paths)} are: {', '.join(paths)})")
    elif settings["grad_checkpoint"] == "auto" and {"-c", "--config"} & set(typed):
        lines.append("  (take grad_checkpoint out of the configuration file: it would read auto as yes)")
    if linear:
        lines.append("  (it holds the logits of the whole batch; here those of a few tokens at a time are held)")
    limit = getattr(fit, "limit_bytes", None)
    if limit is not None:
        lines.append(f"  (it sets no memory limit; here it is {format_limit(limit)}, without which the peak is higher)")
    return "\n".join(["The plain command that comes nearest:", command, *map(folded, lines)])


def checkpointed_paths(fit: object) -> tuple[str, ...]:
    """The blocks that a fit or a plan checkpoints; nothing for a batch search."""
    plan = getattr(fit, "plan", fit)
    return tuple(getattr(plan, "paths", ()))


def _ranks() -> int:
    import mlx.core as mx

    return int(mx.distributed.init().size())
