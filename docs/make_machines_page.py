"""Write the page of machines from the files in docs/measurements/machines/: python docs/make_machines_page.py

`tests/docs/test_machines_page.py` holds that the page in the repository is what this writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_tune.bench.reading import read_report
from mlx_tune.bench.report import HOLDS, BenchReport, Row, SectionResult
from mlx_tune.bench.sections import SECTIONS, Claim
from mlx_tune.units import format_bytes

FOLDER = Path(__file__).resolve().parent / "measurements" / "machines"
PAGE = FOLDER.with_suffix(".md")

_INTRODUCTION = """\
<!-- Made by `python docs/make_machines_page.py` from the files in docs/measurements/machines/: change those. -->

# Machines

Claims of these pages, measured on whole machines: a row a machine, from the file that this command writes there.

<!-- not run: it takes minutes; tests/bench runs each section at toy sizes -->
```console
$ mlx-tune bench
```

Yours is missing? `mlx-tune bench` takes about ten minutes, and `mlx-tune bench --quick` one; it takes at most half of
the memory that is free, and stops at Ctrl-C with what it has. Send the file: attach it to an issue of the kind "A
machine", or add it to `docs/measurements/machines/` and run `python docs/make_machines_page.py`. It holds no user names
and no paths.

**No Mac is among them yet**: none was at hand, so nothing on this page is from an Apple GPU.
"""

_FORM = """\
## The form of a file

JSON under `"schema": 1`; `mlx_tune/bench/reading.py` holds every key and its type, and refuses a file with others.
`sections` has for each section the figures (`figures`), the claims beside them (`rows`, whose `holds` is `true`,
`false`, or `null` where that machine cannot tell), the time and the most memory that it took. `null` anywhere else
stands for what is not known. Files whose `source` is a page were not written by the command: they hold what that page
says, and nothing else.
"""


def reports(folder: Path = FOLDER) -> dict[str, BenchReport]:
    """Every report of a folder, by the name of its file."""
    return {file.name: read_report(file.read_text(), file.name) for file in sorted(folder.glob("*.json"))}


def machines_page(found: Mapping[str, BenchReport]) -> str:
    """The page, in Markdown.

    Args:
        found: Reports by the names of their files.
    """
    macs = any(report.machine.backend == "metal" for report in found.values())
    introduction = _INTRODUCTION.rpartition("\n**No Mac")[0] if macs else _INTRODUCTION
    parts = [introduction, "## All of them\n\n" + _overview(found)]
    for section in SECTIONS:
        parts.append(f"## {section.name}\n")
        parts += [_claim(section.name, claim, found) for claim in section.claims]
    return "\n".join([*parts, _FORM])


def _overview(found: Mapping[str, BenchReport]) -> str:
    rows = [
        "| machine | memory | backend, system | versions | day | hold | do not hold | cannot tell, left out | file |",
        "| --- | ---: | --- | --- | --- | ---: | --- | --- | --- |",
    ]
    for name, report in found.items():
        machine = report.machine
        memory = "not known" if machine.memory_bytes is None else format_bytes(machine.memory_bytes)
        system = machine.backend + (f", {machine.system}" if machine.system else "")
        versions = ", ".join(f"{key} {value}" for key, value in report.versions.items() if key.startswith("mlx"))
        holding = str(sum(row.holds is True for row in report.rows))
        failing = ", ".join(row.claim for row in report.rows if row.holds is False) or "none"
        unclear = [row.claim for row in report.rows if row.holds is None]
        unclear += [section.name for section in report.sections if section.status != "measured"]
        if report.interrupted:
            reached = {section.name for section in report.sections}
            unclear += [f"{section.name} (interrupted)" for section in SECTIONS if section.name not in reached]
        link = f"[{name}](machines/{name})"
        cells = [machine.name, memory, system, versions, report.day or "not known", holding, failing]
        rows.append(f"| {' | '.join([*cells, ', '.join(unclear) or 'none', link])} |")
    return "\n".join(rows) + "\n"


def _claim(section: str, claim: Claim, found: Mapping[str, BenchReport]) -> str:
    rows = [
        f"{claim.text} ([claimed here]({_relative(claim.page)}))\n",
        "| machine | measured | |",
        "| --- | --- | --- |",
    ]
    for report in found.values():
        result = next((one for one in report.sections if one.name == section), None)
        row = next((row for row in (result.rows if result else ()) if row.claim == claim.name), None)
        rows.append(f"| {' | '.join(_cells(report, result, row))} |")
    return "\n".join(rows) + "\n"


def _cells(report: BenchReport, result: SectionResult | None, row: Row | None) -> tuple[str, str, str]:
    name = report.machine.name + (" (small sizes)" if result is not None and result.size == "quick" else "")
    if row is not None:
        return name, row.measured.replace("|", "/"), HOLDS[row.holds]
    if result is not None and result.status != "measured":
        return name, result.reason.replace("|", "/"), result.status
    return name, "not measured", ""


def _relative(page: str) -> str:
    """The way to a page below `docs/` from the page of machines."""
    return page.removeprefix("measurements/") if page.startswith("measurements/") else f"../{page}"


if __name__ == "__main__":
    PAGE.write_text(machines_page(reports()))
