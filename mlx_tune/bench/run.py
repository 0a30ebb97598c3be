"""Measuring one section after another, each in a process of its own, and keeping what there is."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_tune import devices
from mlx_tune.bench.report import BenchMachine, BenchReport, Row, SectionResult
from mlx_tune.bench.sections import SECTIONS, Section
from mlx_tune.diagnosis.child_answers import NoAnswerError, ask
from mlx_tune.diagnosis.doctor import versions
from mlx_tune.diagnosis.report import anonymous
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.interrupts import interruptible, uninterrupted

#: Seconds after which a section counts as hung. Kernels that CUDA compiles take half a minute each.
_SECONDS = 900
_SOURCE = "mlx-tune bench"


def begin(earlier: BenchReport | None = None) -> BenchReport:
    """A report of this machine, today, with nothing measured; or with what an earlier one has of the same machine.

    Args:
        earlier: A report that is to be completed.

    Raises:
        InvalidArgumentError: The earlier report is of another machine, or of other versions.
    """
    machine: dict[str, Any] = _anonymous(vars(devices.machine()))
    machine["system"] = _without_build(machine["system"])
    named = {name: _without_build(version) if name == "on" else version for name, version in versions().items()}
    today = datetime.date.today().isoformat()
    made = BenchReport(today, _SOURCE, False, BenchMachine(**machine), named)
    if earlier is None:
        return made
    if replace(earlier, day=today, interrupted=False, sections=()) != made:
        raise InvalidArgumentError(
            f"It holds figures of {earlier.machine.name} with MLX {earlier.versions.get('mlx')}, which these do not go "
            "with: this machine or a version differs. Name another file, or remove it."
        )
    return replace(made, sections=earlier.sections)


def measure(
    sections: Sequence[Section],
    size: str,
    report: BenchReport,
    *,
    ask_for: Callable[[str, str], Mapping[str, Any]] | None = None,
    starting: Callable[[Section], None] = lambda section: None,
    measured: Callable[[BenchReport], None] = lambda report: None,
) -> BenchReport:
    """Measure sections one after another.

    Args:
        sections: The sections.
        size: "quick" or "full".
        report: The report that they are added to.
        ask_for: Measures a section of a name at a size; in a process of its own by default.
        starting: Told before each section.
        measured: Told the report after each section; the place to write it to a file.

    Returns:
        The report; where a Ctrl-C came, with the sections before it, and marked as interrupted.
    """
    order = [section.name for section in SECTIONS]
    try:
        with uninterrupted():
            for section in sections:
                starting(section)
                with interruptible():
                    result = _result(section, size, ask_for or _ask)
                report = report.with_section(result, order)
                measured(report)
    except KeyboardInterrupt:
        report = replace(report, interrupted=True)
        measured(report)
    return report


def _ask(name: str, size: str) -> Mapping[str, Any]:
    return ask("mlx_tune.bench.section_process", name, size, seconds=_SECONDS)


def _result(section: Section, size: str, ask_for: Callable[[str, str], Mapping[str, Any]]) -> SectionResult:
    """Measure one section and judge its claims; its death is a result too."""
    try:
        answer = ask_for(section.name, size)
    except NoAnswerError as error:
        return SectionResult(section.name, size, "broke", anonymous(str(error)), None, None, (), None)
    figures = answer["figures"]
    if figures is None:
        reason = anonymous(answer["left_out"])
        return SectionResult(section.name, size, "left out", reason, None, None, (), None)
    rows = []
    for claim in section.claims:
        verdict = claim.judge(figures)
        rows.append(Row(claim.name, claim.text, claim.page, anonymous(verdict.measured), verdict.holds))
    seconds, peak = answer["seconds"], answer["peak_bytes"]
    return SectionResult(section.name, size, "measured", "", seconds, peak, tuple(rows), _anonymous(figures))


def _without_build(system: str) -> str:
    """The name of a system without what whoever built its kernel put behind the version.

    Examples:
        >>> _without_build("Linux 6.8.0-31-acme x86_64"), _without_build("macOS 15.4 arm64")
        ('Linux 6.8.0 x86_64', 'macOS 15.4 arm64')
    """
    return re.sub(r"(?<=\d)-\S+", "", system)


def _anonymous(value: Any) -> Any:
    """Figures whose texts tell no names and no paths."""
    if isinstance(value, dict):
        return {key: _anonymous(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_anonymous(inner) for inner in value]
    return anonymous(value) if isinstance(value, str) else value
