"""The one way in which `autobatch`, `checkpoint` and `fit` load, search, print and say what comes next."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from mlx_tune.cli.fine_tuning import PASSED_ON, prepare_run
from mlx_tune.cli.output import (
    Result,
    command_lines,
    folded,
    is_first_rank,
    print_result,
    print_too_large,
    quiet_output,
    save_plot,
)
from mlx_tune.errors import BudgetError

if TYPE_CHECKING:
    from mlx_tune.lm.preparation import FineTuning

R = TypeVar("R", bound=Result)

#: Options of a search that `mlx-tune lora` takes by the same name, besides those of the training run.
_OF_SEARCHES = ("memory_budget", "target_batch")


def search_and_print(
    arguments: argparse.Namespace,
    find: Callable[[FineTuning], R],
    *,
    code: Callable[[R], int] = lambda result: 0,
    trains_with: Sequence[str] = (),
) -> int:
    """Load what the arguments name, search, and print the result.

    Args:
        arguments: With the flags of `add_fine_tuning` and `add_budget`.
        find: Searches with what `mlx_tune.lm.prepare` returns.
        code: The exit code that a result stands for.
        trains_with: Options with which `mlx-tune lora` trains as the result says; none where there is nothing to train.

    Returns:
        The exit code: 1 where not even one row fits.
    """
    try:
        with quiet_output():
            result = find(prepare_run(arguments))
            save_plot(result, getattr(arguments, "plot", None))
    except BudgetError as error:
        print_too_large(error, arguments)
        return 1
    if is_first_rank():
        print_result(result, as_json=arguments.json)
        if trains_with and not arguments.json:
            print(folded("\nTo train so on the command line (it searches again, and sets the limit itself):"))
            print(command_lines(_lora_command(arguments, trains_with)))
    return code(result)


def _lora_command(arguments: argparse.Namespace, options: Sequence[str]) -> list[str]:
    """The command that trains with what was asked about here."""
    words = ["mlx-tune", "lora", "--model", arguments.model, "--data", arguments.data or "DIR", "--train", *options]
    for name in (*PASSED_ON, *_OF_SEARCHES):
        value, flag = getattr(arguments, name, None), f"--{name.replace('_', '-')}"
        if value is not None and flag not in words:
            words += [flag] if value is True else [flag, str(value)]
    return words
