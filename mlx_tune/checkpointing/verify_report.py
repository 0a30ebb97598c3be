"""The findings of `verify_checkpoint`: a row for each parameter, with one of three verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular

#: In the order in which a reader wants them.
VERDICTS = ("different", "not tested", "equal")

_ROWS = 20  # how many parameters the table shows


@dataclass(frozen=True)
class GradientDifference:
    """One parameter's gradient, with and without checkpointing.

    Attributes:
        path: The parameter.
        largest: The largest finite entry of the plain gradient, its absolute value.
        difference: The largest absolute difference between the two gradients; infinite where one is not a number
            and the other is.
        noise: The same between two plain runs: what this machine does not repeat by itself.
        tolerance: The largest difference allowed: rounding in this type, of this gradient or of the model's largest, or
            twice the noise.
        became_zero: The plain gradient is not zero everywhere and the checkpointed one is.
        reason: Why this row puts nothing to the test; empty where it does.
    """

    path: str
    largest: float
    difference: float
    noise: float
    tolerance: float
    became_zero: bool
    reason: str = ""

    @property
    def verdict(self) -> str:
        """The words "equal", "different" or "not tested"."""
        if self.difference > self.tolerance or self.became_zero:
            return "different"
        return "not tested" if self.reason else "equal"

    @property
    def ok(self) -> bool:
        """True where the two were compared and agree."""
        return self.verdict == "equal"

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return {**asdict(self), "verdict": self.verdict, "ok": self.ok}


@dataclass(frozen=True)
class VerifyReport(Tabular):
    """The findings of `verify_checkpoint`. Its `str` is a table.

    Attributes:
        blocks: The paths of the checkpointed modules.
        loss: The loss without checkpointing.
        loss_difference: The distance of the loss with checkpointing from it.
        loss_tolerance: The largest distance allowed.
        parameters: One entry for each trainable parameter: first those that differ, then those that were not tested,
            the largest difference first.
        idle: The paths of those of `blocks` that were not run again, so that nothing was put to the test there: they
            are in evaluation mode, or the loss does not call them.
        notes: Further things that were done for the comparison.
    """

    blocks: tuple[str, ...]
    loss: float
    loss_difference: float
    loss_tolerance: float
    parameters: tuple[GradientDifference, ...]
    idle: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True where the loss agrees, no gradient differs, and at least one was put to the test."""
        return self.verdict == "equal"

    @property
    def verdict(self) -> str:
        """The words "equal", "different" or "not tested", for the whole."""
        if self.loss_difference > self.loss_tolerance or self.wrong:
            return "different"
        return "equal" if any(p.ok for p in self.parameters) else "not tested"

    @property
    def wrong(self) -> tuple[GradientDifference, ...]:
        """The parameters whose gradients do not agree."""
        return tuple(p for p in self.parameters if p.verdict == "different")

    @property
    def untested(self) -> tuple[GradientDifference, ...]:
        """The parameters whose gradients say nothing, each with its reason."""
        return tuple(p for p in self.parameters if p.verdict == "not tested")

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return {
            **asdict(self),
            "ok": self.ok,
            "verdict": self.verdict,
            "parameters": [p.to_dict() for p in self.parameters],
        }

    def table(self) -> Table:
        """The largest differences, and the verdict."""
        shown = self.parameters[:_ROWS]
        rows = [
            (
                p.path,
                f"{p.largest:.3g}",
                f"{p.difference:.3g}",
                f"{p.tolerance:.3g}",
                "ZERO" if p.became_zero else "WRONG" if p.verdict == "different" else p.verdict,
            )
            for p in shown
        ]
        return Table(
            ["parameter", "largest gradient", "difference", "allowed", ""],
            rows,
            title=f"{len(self.blocks)} checkpointed block{'' if len(self.blocks) == 1 else 's'} against none",
            notes=list(self._explained(len(self.parameters) - len(shown))),
        )

    def _explained(self, hidden: int) -> Iterator[str]:
        if hidden:
            yield f"and {hidden} more, none worse"
        yield f"loss {self.loss:.6g}, difference {self.loss_difference:.3g}"
        if self.wrong:
            yield f"{len(self.wrong)} of {len(self.parameters)} gradients are wrong."
        elif self.verdict == "different":
            yield "The loss is wrong, and no gradient is: the block does something else each time it runs."
        elif self.verdict == "not tested":
            yield "Nothing was put to the test: this says nothing for checkpointing, and nothing against it."
        else:
            yield f"Checkpointing changes no gradient{' that was put to the test' if self.untested else ''}."
        reasons: dict[str, list[str]] = {}
        for p in self.untested:
            reasons.setdefault(p.reason, []).append(p.path)
        for reason, paths in reasons.items():
            yield f"Not tested, {len(paths)} of {len(self.parameters)}: {reason}: {_listed(paths)}."
        yield from self.notes
        if self.idle:
            yield (
                f"{len(self.idle)} of {len(self.blocks)} blocks did not run again, so nothing was tested there: "
                f"{_listed(self.idle)}. They are in evaluation mode, the loss does not call them, "
                "or no parameter in them or before them is trained."
            )
        if any(p.became_zero for p in self.parameters):
            yield (
                "ZERO: the block uses this parameter where checkpoint() cannot see it. Pass it as an argument, or "
                "make it an attribute of the block."
            )
        if any(not p.became_zero for p in self.wrong):
            yield (
                "WRONG: the block does something else when it is run again, or uses this parameter where checkpoint() "
                "cannot see it. Look for Python's or NumPy's random numbers, a counter or a clock in it; pass the "
                "parameter as an argument, or make it an attribute of the block."
            )


def _listed(paths: Sequence[str]) -> str:
    return f"{', '.join(paths[:_ROWS])}{', ...' if len(paths) > _ROWS else ''}"
