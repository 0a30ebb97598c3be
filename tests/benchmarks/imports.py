"""What `import mlx_tune` costs beside `import mlx.core, mlx.nn`: python tests/benchmarks/imports.py [--runs 20]

Fresh interpreters, in turns, so that what else the machine does hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

TIMED = """
import time
start = time.perf_counter()
{code}
print(time.perf_counter() - start)
"""

CASES = {
    "import mlx.core, mlx.nn": "import mlx.core, mlx.nn",
    "import mlx_tune": "import mlx_tune",
    "both": "import mlx.core, mlx.nn, mlx_tune",
    "both, every name looked up": (
        "import mlx.core, mlx.nn, mlx_tune\nfor name in mlx_tune._HOMES: getattr(mlx_tune, name)"
    ),
}


def seconds(code: str) -> float:
    """The time that a fresh interpreter takes for the code, its own start not counted."""
    child = [sys.executable, "-c", TIMED.format(code=code)]
    return float(subprocess.run(child, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--quick", action="store_const", const=3, dest="runs")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    for code in CASES.values():
        seconds(code)  # byte code and file cache warm for all
    runs = [{name: seconds(code) for name, code in CASES.items()} for _ in range(arguments.runs)]
    medians = {name: statistics.median(run[name] for run in runs) for name in CASES}
    reference = next(iter(CASES))
    from mlx_tune.presentation.tables import render_table
    from mlx_tune.units import format_seconds

    rows = [
        [name, format_seconds(time), f"{statistics.median(run[name] / run[reference] for run in runs):.2f}"]
        for name, time in medians.items()
    ]
    print(render_table(["imported", "median", "times the reference"], rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(medians, file, indent=2)


if __name__ == "__main__":
    main()
