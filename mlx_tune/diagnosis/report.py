"""The results of a diagnosis: one `CheckResult` a check, and the `Diagnosis` that holds them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular

Status = Literal["pass", "warn", "fail", "skip"]

#: The version of what `to_dict` returns. It changes when a key is renamed or removed, not when one is added.
SCHEMA = 1

_MARKS: dict[str, str] = {"pass": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}


@dataclass(frozen=True)
class CheckResult:
    """The finding of one check.

    Attributes:
        name: The check, as `--only` takes it.
        theme: Its subject: "installation", "machine", "gpu", "compute" or "bench".
        status: "pass"; "warn", it works but not well; "fail", it does not work; "skip", it does not apply here.
        summary: One line.
        fix: The remedy, to copy and paste; empty where there is nothing to do.
        figures: Measurements and readings, ready for JSON.
    """

    name: str
    theme: str
    status: Status
    summary: str
    fix: str = ""
    figures: dict[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Diagnosis(Tabular):
    """The findings of every check.

    `str` is the table, `to_dict` the same for programs, `issue` what to paste into a bug report.

    Attributes:
        results: In the order in which the checks were made.
        versions: The versions of Python, MLX and what goes with it.
    """

    results: tuple[CheckResult, ...]
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        """True where nothing failed. Warnings are no failures."""
        return not self.select("fail")

    @property
    def exit_code(self) -> int:
        """1 where a check failed, else 0."""
        return 0 if self.ok else 1

    def select(self, *statuses: Status) -> tuple[CheckResult, ...]:
        """The results that ended so."""
        return tuple(result for result in self.results if result.status in statuses)

    def __getitem__(self, name: str) -> CheckResult:
        """The result of the check of that name."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def __str__(self) -> str:
        """A line a check, each followed by its fix, and a line that counts them."""
        width = max((len(result.name) for result in self.results), default=0)
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items())]
        theme = ""
        for result in self.results:
            if result.theme != theme:
                theme = result.theme
                lines += ["", theme]
            lines.append(f"  {_MARKS[result.status]:4}  {result.name.ljust(width)}  {result.summary}".rstrip())
            if result.fix:
                lines += [f"  {'':4}  {'':{width}}    {line}".rstrip() for line in f"-> {result.fix}".splitlines()]
        return "\n".join([*lines, "", self.verdict()])

    def table(self) -> Table:
        """The same as a table, for a notebook."""
        rows = [(r.theme, _MARKS[r.status], r.name, r.summary, r.fix) for r in self.results]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return Table(["theme", "", "check", "finding", "fix"], rows, title=versions, notes=[self.verdict()])

    def verdict(self) -> str:
        """One line: how many checks failed, warned and passed."""
        counts = {status: len(self.select(status)) for status in ("fail", "warn", "pass", "skip")}
        skip = "does not apply here" if counts["skip"] == 1 else "do not apply here"
        words = (("fail", "failed"), ("warn", "to look at"), ("pass", "passed"), ("skip", skip))
        return ", ".join(f"{counts[key]} {word}" for key, word in words if counts[key]) or "nothing was checked"

    def to_dict(self) -> dict[str, Json]:
        """All of it, ready for JSON, under keys that stay."""
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "versions": dict(self.versions),
            "checks": [result.to_dict() for result in self.results],
        }

    def issue(self) -> str:
        """Markdown to paste into a bug report: the same findings without user names, host names or paths."""
        lines = [f"- {name} {version}" for name, version in self.versions.items()]
        lines += ["", "| check | status | finding |", "| --- | --- | --- |"]
        lines += [f"| {r.name} | {r.status} | {r.summary.replace('|', '/')} |" for r in self.results]
        return anonymous("\n".join(lines))


def anonymous(text: str, names: Iterable[str] | None = None) -> str:
    """Take out of a text what tells who and where.

    Args:
        text: The text.
        names: The names that must not be in it; by default this user's and this host's.

    Returns:
        The text with paths cut down to their last part, and names replaced.

    Examples:
        >>> anonymous("see /home/ann/.venv/lib/libmlx.so", names=["ann"])
        'see .../libmlx.so'
    """
    text = re.sub(r"(?:~|\b[A-Za-z]:)?(?:[/\\][^\s/\\:|`'\")]+)+[/\\]([^\s/\\:|`'\")]+)", r".../\1", text)
    for name in _own_names() if names is None else names:
        text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", "<name>", text)
    return text


def _own_names() -> list[str]:
    import getpass
    import platform
    from pathlib import Path

    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = ""  # a container may run under a number that has no name
    names = {user, Path.home().name, platform.node(), platform.node().split(".")[0]}
    # A name that is a word of the report would take the report apart.
    return sorted((name for name in names if len(name) > 2 and name not in ("root", "mlx", "cpu", "gpu")), key=len)[
        ::-1
    ]
