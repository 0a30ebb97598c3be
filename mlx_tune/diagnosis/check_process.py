"""The process in which a check that needs MLX runs: `python -m mlx_tune.diagnosis.check_process NAME`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

#: What the line with the answer starts with: a check's libraries may print too.
MARK = "mlx_tune.diagnosis: "


def main(argv: Sequence[str]) -> int:
    """Make the check of that name and print what it found as JSON, after `MARK`."""
    from mlx_tune.diagnosis import check

    (name,) = argv
    (one,) = [one for one in check.all_checks() if one.name == name]
    print(MARK + json.dumps(one.run().to_dict()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
