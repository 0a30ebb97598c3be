"""The process in which a check that needs MLX runs: `python -m mlx_tune.diagnosis.check_process NAME`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mlx_tune.diagnosis.child_answers import say


def main(argv: Sequence[str]) -> int:
    """Make the check of that name and answer with what it found."""
    from mlx_tune.diagnosis import check

    (name,) = argv
    (one,) = [one for one in check.all_checks() if one.name == name]
    say(one.run().to_dict())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
