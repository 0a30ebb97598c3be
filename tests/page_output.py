"""Output on a page against what is printed, where `...` stands for anything and runs of blanks are one."""

from __future__ import annotations

import re


def matches(expected: str, printed: str) -> bool:
    """Whether the output is what the page says."""
    pieces = [re.escape(" ".join(piece.split())) for piece in expected.split("...")]
    return re.fullmatch(r"\s*.*?\s*".join(pieces), " ".join(printed.split()), re.DOTALL) is not None
