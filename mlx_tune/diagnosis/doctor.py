"""`diagnose`: make the checks, each on its own, and gather what they found."""

from __future__ import annotations

import platform
from collections.abc import Iterable

from mlx_tune import devices
from mlx_tune.diagnosis import check
from mlx_tune.diagnosis.check import Check
from mlx_tune.diagnosis.checks import distributions
from mlx_tune.diagnosis.child_answers import NoAnswerError, ask
from mlx_tune.diagnosis.report import CheckResult, Diagnosis
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.progress import progress_bar
from mlx_tune.version import __version__

#: What a check in a child process may take before it counts as hung.
CHECK_SECONDS, BENCH_SECONDS = 120, 600
#: The check that says whether MLX can be imported at all.
_IMPORT = "mlx-import"


def diagnose(
    only: str | Iterable[str] | None = None, *, bench: bool | str | Iterable[str] = False, progress: bool = True
) -> Diagnosis:
    """Look for what is wrong with this installation and this machine.

    Works where `import mlx.core` dies: everything that needs MLX runs in a process of its own, and a check that
    crashes is a failed check. The machine is left as it is.

    Args:
        only: The checks to make, by name; all of them by default.
        bench: True also makes the measurements that show lazy evaluation, unified memory, matmul, quantized matmul,
            checkpointing and wiring with this machine's figures, which takes a minute or two; or the names of those
            to make.
        progress: True where to show a progress line on standard error.

    Returns:
        The findings. `str` is the table, `exit_code` is 1 where a check failed. Where MLX cannot be imported and a
        check needs it, `mlx-import`, which says why, is among them whether it was named or not.

    Raises:
        InvalidArgumentError: There is no check of a name that was given; the text lists them.

    Examples:
        >>> diagnosis = diagnose(only="python")
        >>> diagnosis["python"].status
        'pass'
    """
    chosen = _choose(only, bench)
    results: dict[str, CheckResult] = {}
    importable = _run(_by_name()[_IMPORT], results) if any(one.in_child for one in chosen) else None
    with progress_bar("checking", total=len(chosen), enabled=progress) as bar:
        for one in chosen:
            bar.update(text=one.name)
            if one.in_child and importable is not None and importable.status == "fail":
                results[one.name] = CheckResult(one.name, one.theme, "skip", f"MLX cannot be imported: see {_IMPORT}")
            else:
                _run(one, results)
            bar.advance()
    names = [one.name for one in chosen]
    if importable is not None and importable.status == "fail" and _IMPORT not in names:
        names.insert(0, _IMPORT)
    return Diagnosis(tuple(results[name] for name in names), versions())


def _run(one: Check, results: dict[str, CheckResult]) -> CheckResult:
    if one.name not in results:
        results[one.name] = run_in_child(one) if one.in_child else one.run()
    return results[one.name]


def _by_name() -> dict[str, Check]:
    return {one.name: one for one in check.all_checks()}


def _choose(only: str | Iterable[str] | None, bench: bool | str | Iterable[str]) -> list[Check]:
    known = _by_name()
    names = None if only is None else _names(only)
    benches = set() if isinstance(bench, bool) else _names(bench)
    for name in (names or set()) | benches:
        if name not in known:
            raise InvalidArgumentError(f"There is no check {name!r}. There are: {', '.join(known)}.")
    for name in benches:
        if not known[name].bench:
            measured = ", ".join(one.name for one in known.values() if one.bench)
            raise InvalidArgumentError(f"{name!r} is no measurement: give it as only={name!r}. Those are: {measured}.")
    if names is None and benches:
        names = benches
    if names is not None:
        return [one for one in known.values() if one.name in names | benches]
    return [one for one in known.values() if bench is True or not one.bench]


def _names(given: str | Iterable[str]) -> set[str]:
    return {given} if isinstance(given, str) else set(given)


def run_in_child(one: Check, python: str | None = None, environment: dict[str, str] | None = None) -> CheckResult:
    """Make a check in a process of its own, and take its death for a failure.

    Args:
        one: The check.
        python: The interpreter; this one by default.
        environment: Its environment; this one by default, with this library on the path.
    """
    seconds = BENCH_SECONDS if one.bench or one.compiles else CHECK_SECONDS
    try:
        answer = ask(
            "mlx_tune.diagnosis.check_process", one.name, seconds=seconds, python=python, environment=environment
        )
    except NoAnswerError as error:
        return one.crashed(str(error))
    return CheckResult(**answer)


def versions() -> dict[str, str]:
    """The versions that a bug report needs."""
    found = distributions.installed()
    names = ("mlx", *distributions.BACKENDS, "mlx-lm")
    listed = {name: found[name].version for name in names if name in found}
    return {
        "mlx_tune": __version__,
        "Python": platform.python_version(),
        **listed,
        "on": f"{devices.system_name()} {platform.machine()}",
    }
