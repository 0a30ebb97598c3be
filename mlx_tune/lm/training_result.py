"""The record of a training run: the figures that `lm.train` hands back."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_bytes, format_count, format_limit, format_seconds

#: More lines of losses than this say no more; the table then shows some of them, the first and the last included.
_MOST_LINES = 12


@dataclass(frozen=True)
class LossReport:
    """One line of the training log.

    Attributes:
        iteration: Batches so far.
        tokens: Tokens trained on so far, all ranks together.
        loss: Mean loss since the line before, in nats a token; for a validation, of the validation set.
        tokens_per_second: The rate since the line before; None for a validation.
    """

    iteration: int
    tokens: int
    loss: float
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class TrainingResult(Tabular):
    """A finished run of mlx-lm's trainer.

    Attributes:
        iterations: Batches trained on.
        batch_size: Rows in a batch, all ranks together.
        accumulation_steps: Batches to an update of the optimizer.
        ranks: Processes that shared the work.
        tokens: Tokens trained on, padding left out, all ranks together.
        tokens_per_second: Over the whole training, validation left out.
        seconds: Wall time of the run, validation and saving included.
        peak_bytes: The most that MLX's arrays held at once in this process.
        cache_bytes: The memory that MLX kept for reuse at the end.
        footprint_bytes: The memory that the system charged the process with at the end.
        limit_bytes: The memory limit that held; None for MLX's own.
        checkpointed: Paths of the blocks that were checkpointed.
        wired: The wired memory, or the reason why there was none.
        loss: The loss in words: linear, plain and why, or that it was given.
        truncation: The training rows and tokens that were cut at `max_seq_length`, in words.
        losses: The training log.
        validation_losses: The validations.
        adapter_file: Where the trained weights are.
        fit: The search that batch, checkpoints and limit were taken from, as its `to_dict()`; None where they were
            given.
    """

    iterations: int
    batch_size: int
    accumulation_steps: int
    ranks: int
    tokens: int
    tokens_per_second: float
    seconds: float
    peak_bytes: int
    cache_bytes: int
    footprint_bytes: int
    limit_bytes: int | None
    checkpointed: tuple[str, ...]
    wired: str
    loss: str
    truncation: str
    losses: tuple[LossReport, ...]
    validation_losses: tuple[LossReport, ...]
    adapter_file: str
    fit: dict[str, Json] | None = None

    def loss_at(self, tokens: int) -> float:
        """The training loss once so many tokens were trained on: for comparing runs with different batches.

        Args:
            tokens: A number of tokens.

        Returns:
            The loss of the first line of the log at or after it, of the last line where there is none.
        """
        return next((line for line in self.losses if line.tokens >= tokens), self.losses[-1]).loss

    def table(self) -> Table:
        """The figures, then the log."""
        batch = f"{self.batch_size} rows"
        if self.accumulation_steps > 1:
            batch += f" x {self.accumulation_steps} = {self.batch_size * self.accumulation_steps} an update"
        if self.ranks > 1:
            batch += f", over {self.ranks} ranks"
        limit = "" if self.limit_bytes is None else f", under a limit of {format_limit(self.limit_bytes)}"
        lines = [
            f"{self.iterations} iterations of {batch}: {self.tokens:,} tokens in {format_seconds(self.seconds)}, "
            f"{self.tokens_per_second:,.0f} tokens/s",
            f"peak of MLX's arrays {format_bytes(self.peak_bytes)}{limit}; at the end MLX kept "
            f"{format_bytes(self.cache_bytes)} for reuse, and the whole process, Python and libraries included, took "
            f"{format_bytes(self.footprint_bytes)}",
            f"{format_count(len(self.checkpointed), 'block')} checkpointed; {self.wired}",
            f"loss: {self.loss}",
            f"training rows: {self.truncation}",
            f"weights in {self.adapter_file}",
        ]
        rows = [(*_cells(line), "") for line in _thinned(self.losses)]
        rows += [(*_cells(line), "validation") for line in _thinned(self.validation_losses)]
        rows.sort(key=lambda row: (row[0], bool(row[-1])))
        return Table(["iteration", "tokens", "loss", "tokens/s", ""], rows, title="\n".join(lines))

    def to_dict(self) -> dict[str, Json]:
        """Everything, ready for JSON."""
        return asdict(self)


def _thinned(lines: tuple[LossReport, ...]) -> list[LossReport]:
    """At most `_MOST_LINES` lines, evenly spread, the last among them."""
    step = -(-len(lines) // _MOST_LINES) if lines else 1
    return list(lines[::-1][::step][::-1])


def _cells(line: LossReport) -> tuple[int, str, str, str | None]:
    rate = None if line.tokens_per_second is None else f"{line.tokens_per_second:,.0f}"
    return line.iteration, f"{line.tokens:,}", f"{line.loss:.3f}", rate
