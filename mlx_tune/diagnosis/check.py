"""Checks, and the list of all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlx_tune.diagnosis import installer
from mlx_tune.diagnosis.report import CheckResult, Status

#: The modules that hold checks, in the order in which the report shows them.
_MODULES = ("installation", "machine", "gpu", "compute", "kernels", "bench")


@dataclass(frozen=True)
class Finding:
    """The answer of a check's function.

    Attributes:
        status: The outcome.
        summary: One line.
        fix: Which of the check's remedies helps; empty for none.
        values: Values for the remedy's placeholders.
        figures: Measurements and readings, ready for JSON.
    """

    status: Status
    summary: str
    fix: str = ""
    values: dict[str, object] = field(default_factory=dict)
    figures: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One check: a function, and what is said about it in the documentation.

    Attributes:
        name: As `--only` takes it.
        theme: The heading that it stands under.
        function: Looks, and returns a `Finding`. Its docstring says what for. Every argument has a default, which
            reads this machine; tests put faults there.
        remedies: Remedies, by what was found. Placeholders are filled in by the finding, and
            `uv pip` becomes the command that reaches this environment.
        in_child: True where it imports MLX, and so runs in a process of its own.
        bench: True where it measures, and so runs only when asked to.
        compiles: True where MLX may have to compile kernels for it first, which takes minutes on CUDA.
    """

    name: str
    theme: str
    function: Callable[..., Finding]
    remedies: dict[str, str]
    in_child: bool = False
    bench: bool = False
    compiles: bool = False

    @property
    def title(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def explanation(self) -> str:
        """The rest of the function's docstring."""
        lines = (self.function.__doc__ or "").strip().splitlines()[1:]
        return "\n".join(line.strip() for line in lines).strip()

    def result(self, finding: Finding) -> CheckResult:
        """The finding, with the remedy written out."""
        fix = self.remedies[finding.fix].format(**finding.values) if finding.fix else ""
        fix = installer.in_this_environment(fix)
        summary = " ".join(finding.summary.split())
        return CheckResult(self.name, self.theme, finding.status, summary, fix, finding.figures)

    def run(self, **planted: object) -> CheckResult:
        """Make the check in this process. A crash of it is its own failure.

        Args:
            planted: Readings to use in place of this machine's.
        """
        try:
            return self.result(self.function(**planted))
        except ModuleNotFoundError as error:
            fix = installer.in_this_environment(f"uv pip install {error.name}")
            return CheckResult(self.name, self.theme, "fail", f"it needs {error.name}, which is not installed", fix)
        except Exception as error:
            return self.crashed(f"{type(error).__name__}: {error}")

    def crashed(self, how: str) -> CheckResult:
        """The result for a check that could not be made."""
        summary = f"the check itself broke: {' '.join(how.split())[:300]}"
        return CheckResult(self.name, self.theme, "fail", summary, "mlx-tune doctor --issue  # and report it")


_registered: dict[str, Check] = {}


def check(
    name: str,
    theme: str,
    *,
    remedies: dict[str, str] | None = None,
    in_child: bool = False,
    bench: bool = False,
    compiles: bool = False,
) -> Callable[[Callable[..., Finding]], Check]:
    """Make a function the check of this name. See `Check` for the arguments."""

    def register(function: Callable[..., Finding]) -> Check:
        _registered[name] = Check(name, theme, function, dict(remedies or {}), in_child, bench, compiles)
        return _registered[name]

    return register


def all_checks() -> tuple[Check, ...]:
    """Every check, in the report's order."""
    for module in _MODULES:
        importlib.import_module(f"mlx_tune.diagnosis.checks.{module}")
    return tuple(_registered.values())


def passed(summary: str, *, figures: Mapping[str, object] | None = None) -> Finding:
    """It is as it should be."""
    return Finding("pass", summary, figures=dict(figures or {}))


def skipped(summary: str, *, figures: Mapping[str, object] | None = None) -> Finding:
    """It does not apply here, and why."""
    return Finding("skip", summary, figures=dict(figures or {}))


def warned(
    summary: str,
    fix: str = "",
    values: Mapping[str, object] | None = None,
    *,
    figures: Mapping[str, object] | None = None,
) -> Finding:
    """It works, but not well."""
    return Finding("warn", summary, fix, dict(values or {}), dict(figures or {}))


def failed(
    summary: str,
    fix: str = "",
    values: Mapping[str, object] | None = None,
    *,
    figures: Mapping[str, object] | None = None,
) -> Finding:
    """It does not work."""
    return Finding("fail", summary, fix, dict(values or {}), dict(figures or {}))
