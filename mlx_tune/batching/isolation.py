"""A trial in a process of its own: one that is killed, crashes or hangs takes nothing with it, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_tune.batching.journal import Journal
from mlx_tune.batching.journal_lines import interrupted
from mlx_tune.batching.result import Trial
from mlx_tune.errors import InvalidArgumentError, TraceError, TrialError
from mlx_tune.files.scratch import writing
from mlx_tune.files.unfinished import own_folder
from mlx_tune.measuring.throttle import Throttle
from mlx_tune.units import format_seconds

#: How much of what the child wrote to standard error goes into an error.
_LINES = 12
#: The script between this process and a trial's.
_WATCHDOG = Path(__file__).with_name("watchdog.py")


class IsolatedProbe:
    """Runs each trial in a fresh process, which builds step, batches and state by calling the factory.

    Args:
        factory: "module:function"; the function takes nothing and returns `(step, make_batch, state)`.
        budget_bytes: The limit of the child; what the parent holds is off it already.
        timeout: Seconds after which a trial counts as hanging, or None.
        journal: Told of a trial that was running when this process was killed, and so proved nothing.

    Raises:
        InvalidArgumentError: The factory is not written as "module:function".
    """

    def __init__(self, factory: str, budget_bytes: int, timeout: float | None, journal: Journal | None = None) -> None:
        """Check the spelling; the factory itself is only ever called in children."""
        module, _, function = factory.partition(":")
        if not module or not function.isidentifier():
            raise InvalidArgumentError(
                f'isolate={factory!r}: write it as "module:function"; the function returns (step, make_batch, state).'
            )
        self.factory, self.budget_bytes, self.timeout, self.journal = factory, budget_bytes, timeout, journal
        self.throttle = Throttle()
        self.unit = "rows"
        self.seen: dict[int, list[tuple[int, int]]] = {}

    def trial(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """Measure one size in a child; one that does not come back makes a trial that does not fit.

        Raises:
            TrialError: The factory or the step raised; the child's own words are in the text.
        """
        request = {
            "size": size,
            "predicted_bytes": predicted_bytes,
            "steps": steps,
            "worst": list(self.throttle.worst.items()),
            "seen": self.seen.get(size, []),
        }
        answer = self._ask(request, f"The trial of batch size {size}")
        if isinstance(answer, str):
            return [Trial(size, predicted_bytes, limit_bytes=self.budget_bytes, reason=answer)]
        for share, peak in answer["worst"]:
            self.throttle.note(float(share), peak)
        self.unit, self.seen[size] = answer["unit"], answer["seen"]
        return [Trial(**trial) for trial in answer["trials"]]

    def knots(self, sizes: Sequence[int]) -> dict[int, int]:
        """The step's needs at a few of the sizes, read off its graph in a child; nothing but a first step is run.

        Raises:
            TraceError: The step cannot be described without running it, or the child did not survive that.
            TrialError: The factory or the step raised; the child's own words are in the text.
        """
        spelled = [sizes.start, sizes.stop, sizes.step] if isinstance(sizes, range) else None
        answer = self._ask({"range": spelled, "sizes": None if spelled else list(sizes)}, "Reading the step's graph")
        if isinstance(answer, str):
            raise TraceError(answer)
        if answer["untraceable"] is not None:
            raise TraceError(answer["untraceable"])
        return {int(size): needed for size, needed in answer["knots"]}

    def _ask(self, request: dict[str, Any], what: str) -> dict[str, Any] | str:
        """A child's answer, or how it died."""
        request |= {
            "factory": self.factory,
            "budget_bytes": self.budget_bytes,
            "path": [entry or os.getcwd() for entry in sys.path],
        }
        with own_folder(Path(tempfile.gettempdir()), "mlx_tune-trial-") as folder:
            answer, words = folder / "answer.json", folder / "stderr.txt"
            with writing(folder, "The request to a trial's process"):
                (folder / "request.json").write_text(json.dumps(request))
            with words.open("w") as stderr:
                code = self._wait(str(folder), stderr, request.get("size"))
            if code == 0 and answer.exists():
                read: dict[str, object] = json.loads(answer.read_text())
                return read
            if code is None or code < 0:
                return _how_it_died(code, self.timeout)
            tail = "\n".join(words.read_text(errors="replace").splitlines()[-_LINES:])
            raise TrialError(f"{what} failed in its process (isolate={self.factory!r}):\n{tail}")

    def _wait(self, folder: str, stderr: Any, size: int | None) -> int | None:
        """The child's exit code, negative for a signal; None if it had to be ended for taking too long."""
        last_words = ["", ""]
        if self.journal is not None and size is not None:
            last_words = [str(self.journal.path.absolute()), interrupted(size)]
        trial = [sys.executable, "-m", "mlx_tune.batching.isolation", folder]
        environment = dict(os.environ)
        package = str(Path(__file__).parents[2])
        environment.pop("MLX_RANK", None)  # a child is alone: it must not take its parent's place among the ranks
        environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
        watch = subprocess.Popen(
            [sys.executable, "-P", str(_WATCHDOG), folder, *last_words, *trial],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,
            text=True,
        )
        in_time = True
        try:
            watch.wait(self.timeout)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            code, _ = watch.communicate("end\n")  # also where this process is being interrupted
        return (int(code) if code else watch.returncode) if in_time else None


def _how_it_died(code: int | None, timeout: float | None) -> str:
    if code is None:
        return f"its process took longer than trial_timeout={format_seconds(timeout or 0)} and was ended"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"its process was ended by {name}"


def load_factory(factory: str) -> Callable[[], Any]:
    """Import "module:function"."""
    import importlib

    module, _, function = factory.partition(":")
    found: Callable[[], object] | None = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise InvalidArgumentError(f"isolate={factory!r}: module {module!r} has no function {function!r}.")
    return found


def _child(folder: Path) -> None:
    """Do what the request in `folder` asks for, and leave the answer there."""
    request = json.loads((folder / "request.json").read_text())
    sys.path[:] = [*request["path"], *(entry for entry in sys.path if entry not in request["path"])]
    built = load_factory(request["factory"])()
    if not isinstance(built, tuple) or len(built) != 3:
        raise InvalidArgumentError(
            f"isolate={request['factory']!r} returned {type(built).__name__}: it must return (step, make_batch, state)."
        )
    answer = _one_trial(request, *built) if "size" in request else _knots(request, *built)
    with writing(folder, "The answer of a trial's process"):
        (folder / "answer.json").write_text(json.dumps(answer))


def _one_trial(request: dict[str, Any], step: Any, make_batch: Any, state: object) -> dict[str, object]:
    from dataclasses import asdict

    from mlx_tune.batching.probe import Probe
    from mlx_tune.graphs.tracing.trace import step_of_batches

    step = step_of_batches(step, make_batch, request["size"], state)
    probe = Probe(step, make_batch, state, request["budget_bytes"])
    for share, peak in request["worst"]:
        probe.throttle.note(float(share), peak)
    probe.seen[request["size"]] = [(limit, peak) for limit, peak in request["seen"]]
    trials = probe.trial(request["size"], request["predicted_bytes"], request["steps"])
    return {
        "trials": [asdict(trial) for trial in trials],
        "worst": list(probe.throttle.worst.items()),
        "seen": probe.seen[request["size"]],
        "unit": probe.unit,
    }


def _knots(request: dict[str, Any], step: Any, make_batch: Any, state: object) -> dict[str, object]:
    from mlx_tune.batching.probe import Probe
    from mlx_tune.graphs.tracing.trace import step_of_batches
    from mlx_tune.measuring.forecast import read_ahead
    from mlx_tune.measuring.step_floor import StepFloor

    sizes: Sequence[int] = range(*request["range"]) if request["range"] else request["sizes"]
    step = step_of_batches(step, make_batch, sizes[0], state)
    probe = Probe(step, make_batch, state, request["budget_bytes"])
    floor = StepFloor(step, make_batch, state)
    try:
        forecast = read_ahead(floor, lambda n, least: probe.warm(n, least) and floor.stale, sizes, probe.budget_bytes)
    except TraceError as error:
        return {"knots": [], "untraceable": str(error)}
    return {"knots": list(forecast.knots.items()), "untraceable": None}


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
