"""autobatch against trying every size, and against the rules of other finders.

Each workload runs in a clean process. Its budget lies between what six units of batch need and what seven need, a unit
being an eighth of the workload's usual batch (at least one row). Single peaks scatter upwards, so each size is read
four times with dispatch held back, and the budget is 40 % of the way from the highest peak at six units to the lowest
at seven: which of them fits is then no matter of luck. Where these overlap, units are twice as large and three of
them are asked for, or three times and two. The exhaustive answer is the largest number of units, tried one by one, of
which every peak stays within.

Two other rules search for the same budget, written anew from their descriptions; as users of those libraries do, they
run steps without a memory limit, and a measured peak above the budget stands for an out-of-memory:
accelerate's `find_executable_batch_size` (start large, times 0.9 per failure), and Lightning's `scale_batch_size`
(three steps a trial; double until failure; "binsearch" then halves the interval).

    python tests/benchmarks/autobatch.py [--quick] [--only NAME ...] [--json FILE]
    python tests/benchmarks/autobatch.py --curves

The second searches the generated curves of tests/batching/test_search.py, which takes seconds and no device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = (
    "llama-f32-adamw",
    "llama-bf16-adamw-compiled",
    "llama-f32-lora-adamw",
    "llama-qlora-adamw",
    "llama-f32-sgd-checkpointed",
    "qwen3-f32-adamw",
    "gemma2-f32-sgd",
    "moe-f32-sgd",
    "cnn-f32-adamw-compiled",
    "gru-f32-adamw",
    "transformer-f32-adamw",
    "mlp-f32-adamw",
)
QUICK = ("llama-f32-adamw", "llama-f32-sgd-checkpointed", "cnn-f32-adamw-compiled", "mlp-f32-adamw")
#: How many units are asked for, and how much larger than the smallest these are; the first whose peaks do not overlap.
UNITS = ((6, 1), (3, 2), (2, 3))
READINGS, STEPS = 4, 3


class Meter:
    """Peaks of real steps, each size measured once."""

    def __init__(self, workload: Any) -> None:
        self.workload, self.known = workload, {}

    def __call__(self, size: int, *, held: bool, steps: int) -> list[int]:
        """The peak of each step, with dispatch held back or free."""
        if (size, held, steps) not in self.known:
            self.known[size, held, steps] = self._measure(size, held, steps)
        return self.known[size, held, steps]

    def _measure(self, size: int, held: bool, steps: int) -> list[int]:
        import mlx.core as mx
        from mlx.utils import tree_map
        from workloads import evaluate

        from mlx_tune import memory_limit, track_memory

        batch = tree_map(mx.array, self.workload.make_batch(size))
        mx.eval(batch)
        peaks = []
        for run in range(steps):
            for _ in range(run if held else 0):  # so that runs wait at different places
                mx.eval(mx.zeros((1,))[None].reshape(-1))
            mx.clear_cache()
            with memory_limit(1 if held else mx.get_active_memory() + (1 << 40)), track_memory() as memory:
                evaluate(self.workload, batch)
            peaks.append(memory.peak_bytes)
        return peaks


def pose(meter: Meter, smallest: int) -> tuple[int, int, int]:
    """How many rows a unit has, how many units are to fit, and the budget that lets just these fit."""
    for units, rows in UNITS:
        unit = rows * smallest
        within, above = (meter(n * unit, held=True, steps=READINGS) for n in (units, units + 1))
        if max(within) < min(above):
            break
    return unit, units, max(within) + int(0.4 * (min(above) - max(within)))


def accelerate_rule(fits: Callable[[int], bool], start: int) -> int:
    """Shrink by a tenth per failure, in whole units."""
    while start > 0 and not fits(start):
        start = int(start * 0.9)
    return start


def doubling_rule(fits: Callable[[int], bool], *, halve: bool) -> int:
    """Double until failure, then stay with the last success or halve the interval."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while halve and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def by_rule(
    rule: Callable[[Callable[[int], bool]], int], meter: Meter, unit: int, budget: int, steps: int
) -> dict[str, Any]:
    """Let a rule search in units of batch; count what it tried."""
    tried: list[int] = []

    def fits(units: int) -> bool:
        peak = max(meter(units * unit, held=False, steps=steps))
        tried.append(peak)
        return peak <= budget

    answer = rule(fits)
    return {"batch": answer * unit, "trials": len(tried), "above": sum(peak > budget for peak in tried)}


def measure(name: str) -> dict[str, Any]:
    """Search one workload in every way."""
    from workloads import WORKLOADS

    from mlx_tune import autobatch

    started = time.perf_counter()
    workload = WORKLOADS[name]()
    meter = Meter(workload)
    smallest = max(1, workload.batch_size // 8)
    meter(smallest, held=True, steps=1)
    unit, units, budget = pose(meter, smallest)
    exhaustive = 0
    while max(meter((exhaustive + 1) * unit, held=True, steps=READINGS)) <= budget:
        exhaustive += 1
    result = autobatch(
        workload.step, workload.make_batch, budget=budget, multiple_of=unit, state=workload.state, progress=False
    )
    return {
        "name": name,
        "budget_bytes": budget,
        "exhaustive": exhaustive * unit,
        "batch": result.batch_size,
        "trials": len(result.trials),
        "above": sum((trial.peak_bytes or 0) > budget for trial in result.trials),
        "search_seconds": result.search_seconds,
        "step_times": result.search_seconds / result.seconds,
        "accelerate": by_rule(lambda fits: accelerate_rule(fits, 4 * units), meter, unit, budget, 1),
        "power": by_rule(lambda fits: doubling_rule(fits, halve=False), meter, unit, budget, STEPS),
        "binsearch": by_rule(lambda fits: doubling_rule(fits, halve=True), meter, unit, budget, STEPS),
        "seconds": time.perf_counter() - started,
    }


def curves() -> None:
    """Search a thousand curves of each kind, with and without a shape, and print what it took."""
    import importlib.util

    from mlx_tune.presentation.tables import render_table

    path = Path(__file__).parents[1] / "batching" / "test_search.py"
    spec = importlib.util.spec_from_file_location("test_search", path)
    assert spec is not None
    assert spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    rows = []
    for name, kind, shaped in (
        ("straight", tests.affine, False),
        ("stepped (padding to a multiple of 2 to 16)", tests.stepped, False),
        ("straight with jumps", tests.jumping, False),
        ("straight with 2 % noise", tests.noisy, False),
        ("straight, its shape known", tests.affine, True),
        ("straight, a shape known that is 5 % too steep", tests.affine, 1.05),
        ("bent, its shape known", tests.bent, True),
    ):
        taken, same, above = [], 0, 0
        for curve, budget in tests.cases(kind):
            options = {"shape": lambda n, curve=curve, off=shaped: off * curve(n)} if shaped else {}
            found, measured = tests.run(curve, budget, **options)
            taken.append(len(measured))
            same += found.size == tests.exhaustive(curve, budget)
            above += sum(peak > budget for peak in measured.values())
        mean = sum(taken) / len(taken)
        told = None if kind is tests.noisy else f"{same} of {len(taken)}"  # trying every size gives no one answer there
        rows.append([name, told, f"{mean:.1f}", max(taken), f"{above / len(taken):.2f}"])
    print(render_table(["curve", "same answer", "measurements", "at most", "above the budget"], rows))


def main() -> None:
    """Measure every workload in a child process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four workloads")
    parser.add_argument("--only", nargs="+", help="these workloads")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--curves", action="store_true", help="generated curves instead of workloads")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.curves:
        curves()
        return
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    from mlx_tune.presentation.tables import render_table

    rows = []
    for name in arguments.only or (QUICK if arguments.quick else NAMES):
        done = subprocess.run([sys.executable, __file__, "--child", name], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['batch']} of {rows[-1]['exhaustive']}", file=sys.stderr, flush=True)
    others = ("accelerate", "power", "binsearch")
    table = [
        [
            row["name"],
            row["exhaustive"],
            *(f"{row['batch']}/{row['trials']}/{row['above']}".split("/")),
            f"{row['step_times']:.1f}",
            *("{batch}/{trials}/{above}".format(**row[other]) for other in others),
        ]
        for row in rows
    ]
    columns = ["workload", "exhaustive", "autobatch", "trials", "above", "step times", *others]
    print(render_table(columns, table, notes=["Other rules: batch/trials/trials above the budget."]))
    if rows:
        exact = sum(row["batch"] == row["exhaustive"] for row in rows)
        mean = sum(row["trials"] for row in rows) / len(rows)
        times = sum(row["step_times"] for row in rows) / len(rows)
        above = sum(row["above"] for row in rows)
        print(
            f"exact {exact} of {len(rows)}; above the budget {above}; trials {mean:.1f}, "
            f"step times {times:.1f} on average"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
