"""The reference shows every public name, under the name that users import, with its examples as code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mlx_tune
from mlx_tune import lm

ROOT = Path(__file__).parents[2]
SHOWN = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference" / "api.md").read_text(), re.MULTILINE)


def test_every_public_name_is_in_the_reference():
    names = {name for name in mlx_tune.__all__ if name not in ("lm", "__version__")}
    errors = {name for name in names if name.endswith("Error")}
    assert {f"mlx_tune.{name}" for name in names - errors} - set(SHOWN) == set()
    assert "mlx_tune.errors" in SHOWN
    assert {f"mlx_tune.lm.{name}" for name in lm.__all__} - set(SHOWN) == set()


def test_nothing_is_in_the_reference_twice():
    assert len(SHOWN) == len(set(SHOWN))


@pytest.mark.parametrize("file", sorted((ROOT / "mlx_tune").rglob("*.py")), ids=lambda file: file.stem)
def test_examples_are_named_so_that_they_are_shown_as_code(file):
    """Of Google's two names for the section, only "Examples" is read as one that holds a session."""
    assert not re.search(r"^ *Example:$", file.read_text(), re.MULTILINE)
