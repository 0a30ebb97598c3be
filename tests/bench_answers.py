"""Sections of `mlx-tune bench` answered without measuring."""

from __future__ import annotations

import getpass
import signal
from pathlib import Path
from typing import Any

from mlx_tune.diagnosis.child_answers import NoAnswerError

LAZY = {
    "grown_bytes_by_building": 0,
    "operations": 10,
    "array_bytes": 1000,
    "built_seconds": 1.0,
    "evaluated_seconds": 2.0,
}


def answer(name: str, size: str) -> dict[str, Any]:
    """Good figures of lazy evaluation, kernels that are wrong, no wiring, and the death of everything else.

    Texts hold what a file must not have: the user's name and paths.
    """
    if name == "lazy":
        return {"figures": LAZY, "left_out": "", "peak_bytes": 4000, "seconds": 1.5}
    if name == "kernels":
        fault = f"{getpass.getuser()} saw {Path.home() / 'models' / 'x.metal'}"
        return {"figures": {"tried": 2, "faults": [fault]}, "left_out": "", "peak_bytes": 9000, "seconds": 0.5}
    if name == "wiring":
        return {"figures": None, "left_out": "nothing to wire", "peak_bytes": 0, "seconds": 0.1}
    raise NoAnswerError(f"its process was killed by signal 9: /home/{getpass.getuser()}/lib/python/mlx.so")


def interrupted_at(section: str) -> Any:
    """The same, but a Ctrl-C comes while one section is measured."""

    def ask(name: str, size: str) -> dict[str, Any]:
        if name == section:
            signal.raise_signal(signal.SIGINT)
        return answer(name, size)

    return ask
