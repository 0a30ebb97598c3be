"""The command that installs into the environment that the doctor looked at."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path


def in_this_environment(remedy: str) -> str:
    """Turn a remedy, written with `uv pip`, into what can be pasted here."""
    install, uninstall = commands(
        uv=shutil.which("uv") is not None,
        pip=importlib.util.find_spec("pip") is not None,
        active=_is_active(),
        python=sys.executable,
    )
    return remedy.replace("uv pip install", install).replace("uv pip uninstall", uninstall)


def commands(*, uv: bool, pip: bool, active: bool, python: str) -> tuple[str, str]:
    """The commands that install and uninstall.

    Args:
        uv: True where there is a `uv`.
        pip: True where the environment has a pip of its own; those that uv makes have none.
        active: True where the environment is the one that commands go to by themselves.
        python: Its interpreter.

    Returns:
        Both commands, without the names of packages.

    Examples:
        >>> commands(uv=False, pip=True, active=True, python="/venv/bin/python")
        ('python -m pip install', 'python -m pip uninstall -y')
    """
    if uv or not pip:
        where = "" if active else f" --python {shlex.quote(python)}"
        return f"uv pip install{where}", f"uv pip uninstall{where}"
    program = "python" if active else shlex.quote(python)
    return f"{program} -m pip install", f"{program} -m pip uninstall -y"


def _is_active() -> bool:
    named = (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"))
    return any(name and Path(name).resolve() == Path(sys.prefix).resolve() for name in named)
