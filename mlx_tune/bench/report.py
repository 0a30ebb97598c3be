"""The result of `mlx-tune bench`: sections, their claims, and the machine that they were measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_bytes, format_count, format_seconds

#: The version of the file. It changes when a key is renamed or removed, or what it says changes.
SCHEMA = 1
#: "measured"; "left out": it does not apply, or is not safe, and `reason` says why; "broke": its process died.
Status = Literal["measured", "left out", "broke"]
SIZES = ("toy", "quick", "full")
HOLDS = {True: "holds", False: "does not hold", None: "cannot tell"}


@dataclass(frozen=True)
class Row:
    """A claim beside what was measured.

    Attributes:
        claim: Its name.
        text: The sentence.
        page: The page below `docs/` that says it.
        measured: Short text.
        holds: None where this machine cannot tell.
    """

    claim: str
    text: str
    page: str
    measured: str
    holds: bool | None


@dataclass(frozen=True)
class SectionResult:
    """The outcome of one section.

    Attributes:
        name: As `--only` takes it.
        size: "quick" or "full"; "toy" in tests; None where figures were taken from a page.
        status: Its end.
        reason: Why it was left out, or how it broke; else empty.
        seconds: Its time, if it was measured; None where that is not known.
        peak_bytes: The most memory that its arrays held; None where that is not known.
        rows: Its claims; none where it was not measured.
        figures: Everything that was measured; None where it was not.
    """

    name: str
    size: str | None
    status: Status
    reason: str
    seconds: float | None
    peak_bytes: int | None
    rows: tuple[Row, ...]
    figures: dict[str, Json] | None

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        rows: list[Json] = [dict(vars(row)) for row in self.rows]
        return {**vars(self), "rows": rows}


@dataclass(frozen=True)
class BenchMachine:
    """The machine, as far as it is known.

    Attributes:
        backend: "metal", "cuda" or "cpu".
        name: Of the accelerator, or of the processor on the CPU backend.
        architecture: As MLX says it.
        memory_bytes: Memory that MLX allocates from.
        working_set_bytes: Metal's recommendation; None elsewhere.
        system: The operating system and its version.
    """

    backend: str
    name: str
    architecture: str | None
    memory_bytes: int | None
    working_set_bytes: int | None
    system: str | None


@dataclass(frozen=True)
class BenchReport(Tabular):
    """Claims of the measurement pages, judged on one machine.

    Attributes:
        day: "2026-11-29"; None where that is not known.
        source: "mlx-tune bench", or the page that figures were taken from.
        interrupted: True where it was stopped before its end.
        machine: The machine.
        versions: Of this library, Python, MLX and what goes with it.
        sections: The sections that were reached, in order.
    """

    day: str | None
    source: str
    interrupted: bool
    machine: BenchMachine
    versions: dict[str, str]
    sections: tuple[SectionResult, ...] = ()

    @property
    def broke(self) -> bool:
        """True where the process of a section died."""
        return any(section.status == "broke" for section in self.sections)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every claim that was judged."""
        return tuple(row for section in self.sections for row in section.rows)

    def with_section(self, section: SectionResult, order: Sequence[str]) -> BenchReport:
        """The same with a section added, or put in the place of an earlier one of its name.

        Args:
            section: The section.
            order: The names of all sections, as the report shows them.
        """
        kept = [one for one in self.sections if one.name != section.name]
        return replace(self, sections=tuple(sorted([*kept, section], key=lambda one: order.index(one.name))))

    def verdict(self) -> str:
        """One line: how many claims hold, and how many do not."""
        counts = {holds: sum(row.holds is holds for row in self.rows) for holds in HOLDS}
        said = [f"{format_count(len(self.rows), 'claim')} measured"] if self.rows else []
        said += [f"{HOLDS[holds]}: {count}" for holds, count in counts.items() if count]
        states = {"left out": "left out", "broke": "broke"}
        said += [
            f"{word}: {', '.join(one.name for one in self.sections if one.status == status)}"
            for status, word in states.items()
            if any(one.status == status for one in self.sections)
        ]
        said += ["interrupted"] * self.interrupted
        return "; ".join(said) or "nothing was measured"

    def table(self) -> Table:
        """A row a claim."""
        rows: list[list[object]] = []
        for section in self.sections:
            rows += [[section.name, row.text, row.measured, HOLDS[row.holds]] for row in section.rows]
            if not section.rows:
                rows.append([section.name, "", section.reason, section.status])
        memory = self.machine.memory_bytes
        where = self.machine.name + ("" if memory is None else f", {format_bytes(memory)}")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        title = f"{where}, {self.day or 'day not known'}\n{versions}"
        return Table(["section", "claim", "measured", ""], rows, title=title, notes=self.notes())

    def notes(self) -> list[str]:
        """The verdict, and what it took."""
        seconds = sum(section.seconds or 0.0 for section in self.sections)
        peak = max((section.peak_bytes or 0 for section in self.sections), default=0)
        sizes = sorted({section.size for section in self.sections if section.size is not None})
        return [self.verdict() + ".", f"{format_seconds(seconds)} of measuring, sizes {', '.join(sizes) or 'none'}, "
                f"at most {format_bytes(peak)} of memory."]  # fmt: skip

    def to_dict(self) -> dict[str, Json]:
        """All of it, ready for JSON, under keys that stay."""
        return {
            "schema": SCHEMA,
            "day": self.day,
            "source": self.source,
            "interrupted": self.interrupted,
            "machine": dict(vars(self.machine)),
            "versions": dict(self.versions),
            "sections": [section.to_dict() for section in self.sections],
        }
