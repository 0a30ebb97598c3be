"""An answer out of a Python process of its own, whose death or silence is an answer too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The beginning of the line with the answer: libraries may print too.
MARK = "mlx_tune.diagnosis: "


class NoAnswerError(Exception):
    """The process ended, or had to be ended, without an answer; the text says how."""


def say(answer: Mapping[str, object]) -> None:
    """Print the answer, in the process that was asked."""
    print(MARK + json.dumps(answer), flush=True)


def ask(
    module: str,
    *words: str,
    seconds: float,
    python: str | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a module of this library in a process of its own, and take its answer.

    Args:
        module: The module's dotted name; it answers with `say`.
        words: Its arguments.
        seconds: The time after which the process counts as hung and is ended.
        python: The interpreter; this one by default.
        environment: Its environment; this one by default, with this library on the path.

    Returns:
        The last answer.

    Raises:
        NoAnswerError: It died, hung, or said nothing.
    """
    try:
        ended = subprocess.run(
            [python or sys.executable, "-m", module, *words],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=child_environment() if environment is None else environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"it did not end within {seconds:g} s") from None
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return answer
    last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if ended.returncode < 0:
        raise NoAnswerError(f"its process was killed by signal {-ended.returncode}: {last}")
    raise NoAnswerError(f"its process ended with code {ended.returncode}: {last}")


def child_environment() -> dict[str, str]:
    """This process's environment, with the folder that this library was imported from on the path."""
    home = str(Path(__file__).parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, home])}
