"""The answer of `lm.fits`: a sentence, and the table it was taken from. Every figure in it is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mlx_tune.devices import Backend
from mlx_tune.machines.table import NamedMachine, smallest_mac
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_bytes, format_seconds

_KINDS = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}


@dataclass(frozen=True)
class TrainingWay:
    """One way of training, and how large it gets.

    Attributes:
        way: Its name: "plain", "checkpointed" and so on.
        floor_bytes: The least that a step of the asked batch and length can peak at.
        peak_bytes: The floor and three per cent of it, the share by which estimates may be short. On CUDA, steps under
            a limit of just that peaked 3.4 to 6.7 % above it (docs/measurements/gpu.md).
        fits: True where that stays within the budget.
        largest_batch: The largest batch of rows of the asked length; 0 where not one fits.
        longest_row: The longest row at batch 1, in tokens; 0 where the shortest does not fit.
        row_limited: True where the model itself allows no longer row.
    """

    way: str
    floor_bytes: int
    peak_bytes: int
    fits: bool
    largest_batch: int
    longest_row: int
    row_limited: bool

    @property
    def smallest_mac_gb(self) -> int | None:
        """Memory of the smallest Mac on which the asked step fits, in GB; None where there is none."""
        return smallest_mac(self.peak_bytes)

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return {**asdict(self), "smallest_mac_gb": self.smallest_mac_gb}


def chosen_way(ways: Sequence[TrainingWay]) -> TrainingWay:
    """The first way that fits, and where none does the one that needs the least."""
    return next((way for way in ways if way.fits), min(ways, key=lambda way: way.peak_bytes))


@dataclass(frozen=True)
class GenerationFit:
    """The memory of generating with mlx-lm's batch generator, predicted.

    Attributes:
        context: Tokens of prompt and answer together, in each row.
        batch_size: Rows that are generated at a time.
        kv_bits: Bits of keys and values; None for the model's own dtype.
        weights_bytes: The model's weights.
        cache_bytes: Keys, values and states of all rows at the full context.
        reading_bytes: The peak while the last prompts are read and every other row holds its own.
        writing_bytes: The peak while the last tokens are written.
        peak_bytes: The larger of the two, and the share that estimates may be short.
        fits: True where that stays within the budget.
        longest_context: The longest context of a single row that fits; 0 where none does.
        largest_batch: The largest batch at the context that was asked about; 0 where not one row fits.
        context_limited: True where the model itself allows no longer context.
        batch_limited: True where mlx-lm's code of the architecture takes no larger batch.
    """

    context: int
    batch_size: int
    kv_bits: int | None
    weights_bytes: int
    cache_bytes: int
    reading_bytes: int
    writing_bytes: int
    peak_bytes: int
    fits: bool
    longest_context: int
    largest_batch: int
    context_limited: bool
    batch_limited: bool = False

    def lines(self, budget_bytes: int) -> list[str]:
        """The same in sentences."""
        kv = "" if self.kv_bits is None else f" at {self.kv_bits} bits"
        verb = "fits" if self.fits else "does not fit"
        rows = f"batch {self.batch_size} at {self.context:,} tokens"
        return [
            f"Generating {verb}: {rows} peaks at {format_bytes(self.peak_bytes)} of {format_bytes(budget_bytes)}. "
            f"Weights take {format_bytes(self.weights_bytes)}, keys and values{kv} {format_bytes(self.cache_bytes)}; "
            f"reading prompts peaks at {format_bytes(self.reading_bytes)}, writing at "
            f"{format_bytes(self.writing_bytes)}.",
            f"The longest context of one row is {self.longest_context:,}{'+' if self.context_limited else ''} tokens, "
            f"the largest batch at {self.context:,} tokens {self.largest_batch:,}"
            + (", and mlx-lm's code of this architecture takes no larger one." if self.batch_limited else "."),
        ]

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Confirmation:
    """A real step on this machine, and what was predicted of it.

    Attributes:
        way: The way of training, as in the table.
        backend: This machine's backend, which the prediction is for.
        predicted_bytes: The floor of the step, predicted.
        measured_bytes: The most that it held, measured.
        limit_bytes: The memory limit that it ran under.
        seconds: Its time, compiling included, measured.
    """

    way: str
    backend: Backend
    predicted_bytes: int
    measured_bytes: int
    limit_bytes: int
    seconds: float

    def __str__(self) -> str:
        """A sentence with both figures."""
        apart = self.measured_bytes / self.predicted_bytes - 1
        return (
            f"Confirmed on this machine ({self.backend}), {self.way}: predicted {format_bytes(self.predicted_bytes)}, "
            f"measured {format_bytes(self.measured_bytes)} ({apart:+.1%}) in one step under a limit of "
            f"{format_bytes(self.limit_bytes)}, which took {format_seconds(self.seconds)}."
        )

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Fits(Tabular):
    """If and how a model can be trained and run on a machine, predicted from its configuration.

    Attributes:
        model: The model's name.
        bits: Bits of its weights; None for as they are stored.
        weights_bytes: Its weights, adapters apart.
        fine_tune_type: "lora", "dora" or "full".
        batch_size: Rows of the step that was asked about.
        max_seq_length: Tokens of each.
        machine: The machine, and what MLX may use of it.
        rows: The ways of training.
        extrapolated: True where steps of fewer of the same blocks stand for the whole model's at some sizes.
        seconds: The time that the answer took.
        generation: Generating with it; None where that was not asked.
        confirmation: A real step beside its prediction; None where that was not asked. All else is predicted.
        notes: Further remarks.
    """

    model: str
    bits: int | None
    weights_bytes: int
    fine_tune_type: str
    batch_size: int
    max_seq_length: int
    machine: NamedMachine
    rows: tuple[TrainingWay, ...]
    extrapolated: bool
    seconds: float
    generation: GenerationFit | None = None
    confirmation: Confirmation | None = None
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> TrainingWay:
        """The first way that fits, and where none does the one that needs the least."""
        return chosen_way(self.rows)

    @property
    def fits(self) -> bool:
        """True where at least one way of training fits."""
        return self.chosen.fits

    @property
    def budget_bytes(self) -> int:
        """The limit of peaks."""
        return self.machine.budget_bytes

    @property
    def floor_bytes(self) -> int:
        """The floor of the chosen way."""
        return self.chosen.floor_bytes

    @property
    def peak_bytes(self) -> int:
        """The expected peak of the chosen way."""
        return self.chosen.peak_bytes

    @property
    def largest_batch(self) -> int:
        """The largest batch of any way."""
        return max(way.largest_batch for way in self.rows)

    @property
    def longest_row(self) -> int:
        """The longest row of any way."""
        return max(way.longest_row for way in self.rows)

    @property
    def answer(self) -> str:
        """The answer in a sentence or two."""
        at = "" if self.bits is None else f" at {self.bits} bits"
        subject = f"{_KINDS[self.fine_tune_type]} of {self.model}{at}"
        subject = subject[0].upper() + subject[1:]
        of = f"{format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}"
        rows = f"batch {self.batch_size} at {self.max_seq_length:,} tokens"
        if not self.fits:
            return (
                f"{subject} does not fit {self.machine.name}: {rows} needs {format_bytes(self.peak_bytes)} "
                f"({self.chosen.way}), and {format_bytes(self.budget_bytes)} can be used. {self._way_out()}"
            )
        able = [way for way in self.rows if way.largest_batch]
        batches = ", ".join(f"{way.way} up to batch {way.largest_batch:,}" for way in able)
        return (
            f"{subject} fits {self.machine.name}: {rows}, {self.chosen.way}, peaks at {of}. At that length {batches}. "
            f"The longest row is {self.longest_row:,} tokens."
        )

    def _way_out(self) -> str:
        shorter = max(self.rows, key=lambda way: way.longest_row)
        larger = min((way.smallest_mac_gb for way in self.rows if way.smallest_mac_gb is not None), default=None)
        parts = []
        if shorter.longest_row:
            parts.append(f"rows of up to {shorter.longest_row:,} tokens do at batch 1, {shorter.way}")
        parts.append("no Mac of the table is large enough" if larger is None else f"a Mac with {larger} GB does")
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}."

    def table(self) -> Table:
        """The answer and the table."""
        rows = [
            (
                way.way,
                format_bytes(way.floor_bytes),
                format_bytes(way.peak_bytes),
                "yes" if way.fits else "no",
                f"{way.largest_batch:,}",
                f"{way.longest_row:,}" + ("+" if way.row_limited else ""),
                "none" if way.smallest_mac_gb is None else f"{way.smallest_mac_gb} GB",
            )
            for way in self.rows
        ]
        read = "read there" if self.machine.reading else "by rule, not read"
        predicted = "Every figure is" if self.confirmation is None else "Figures are"
        notes = [
            f"{predicted} predicted, from the configuration alone, in {format_seconds(self.seconds)}. Floor and peak "
            f"are those of batch {self.batch_size} at {self.max_seq_length:,} tokens.",
            f"Budget: {format_bytes(self.budget_bytes)} of {format_bytes(self.machine.usable_bytes)} that MLX may use "
            f"on {self.machine.name} ({read}: {self.machine.source}). Weights: {format_bytes(self.weights_bytes)}.",
        ]
        if any(way.row_limited for way in self.rows):
            notes.append("+: the model's own limit, not memory's.")
        if self.extrapolated:
            notes.append("Other sizes than the asked one are read from models with fewer of the same blocks.")
        notes += self.notes
        if self.generation is not None:
            notes += self.generation.lines(self.budget_bytes)
        if self.confirmation is not None:
            notes.append(str(self.confirmation))
        return Table(
            ["training", "floor", "peak", "fits", "largest batch", "longest row", "smallest Mac"],
            rows,
            title=self.answer,
            notes=notes,
        )

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return {
            "fits": self.fits,
            "answer": self.answer,
            "predicted": True,
            "floor_bytes": self.floor_bytes,
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.budget_bytes,
            "largest_batch": self.largest_batch,
            "longest_row": self.longest_row,
            "way": self.chosen.way,
            "rows": [way.to_dict() for way in self.rows],
            "machine": self.machine.to_dict(),
            "model": self.model,
            "bits": self.bits,
            "weights_bytes": self.weights_bytes,
            "fine_tune_type": self.fine_tune_type,
            "batch_size": self.batch_size,
            "max_seq_length": self.max_seq_length,
            "generation": None if self.generation is None else self.generation.to_dict(),
            "confirmation": None if self.confirmation is None else self.confirmation.to_dict(),
            "extrapolated": self.extrapolated,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
