"""Write the page of architectures from toy models: python docs/make_architectures_page.py

`tests/docs/test_architectures_page.py` holds that the page in the repository is what this writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "reference" / "architectures.md"


def architectures_page() -> str:
    """The page, in Markdown."""
    tests = DOCS.parent / "tests"
    sys.path[:0] = [str(tests), str(tests / "benchmarks")]
    from architectures import page

    return page()


if __name__ == "__main__":
    PAGE.write_text(architectures_page())
