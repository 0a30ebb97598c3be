"""Running a reference and a quantized model on the same batches, one after the other or side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.devices import computes_on_cpu
from mlx_tune.errors import QuantizationError
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.quantization.judging.accuracy import Accuracy, divergence_of
from mlx_tune.quantization.judging.compare_answers import (
    LOGITS_AT_ONCE,
    compare_outputs,
    compare_tokens,
    join_figures,
    quick_divergences,
)
from mlx_tune.quantization.judging.statistics import TokenFigures
from mlx_tune.quantization.judging.summaries import summarise_losses, summarise_outputs, summarise_tokens
from mlx_tune.quantization.models.answers import HALVES, Loss, logits_of, mean_loss, narrow_dtype, output_arrays
from mlx_tune.quantization.models.batches import Batch, rows_at_most
from mlx_tune.quantization.models.layers import EMBEDDINGS, weight_shape
from mlx_tune.quantization.models.sites import ROOM_BYTES, WalkedModel, own_arrays, widen
from mlx_tune.quantization.models.stored_outputs import OutputStore
from mlx_tune.quantization.planning.shape_check import FAULTS, resolve, uncallable
from mlx_tune.units import number

#: Tokens that the noise floor is measured on; fewer on a CPU, which multiplies half-precision numbers slowly.
_FLOOR_TOKENS, _FLOOR_TOKENS_CPU = 2048, 256


@dataclass
class Evaluation:
    """One evaluation: of which kind, on which batches, and what was measured of the reference on its own.

    Attributes:
        kind: "tokens", "loss" or "outputs".
        parts: The arguments of the models, in parts that fit.
        loss: The caller's loss.
        noise_floor: Half precision's own divergence, where measured.
        noise_floor_tokens: Tokens that it was measured on.
        noise_floor_same_top: Share of those with the same most likely token.
        no_noise_floor: Why there is none, where there is none.
        warnings: Reasons to doubt the figures.
        narrow: The narrowest float dtype of what a model gave where that is not float32.
    """

    kind: str
    parts: list[Batch]
    loss: Loss | None = None
    noise_floor: float | None = None
    noise_floor_tokens: int = 0
    noise_floor_same_top: float | None = None
    no_noise_floor: str | None = "not measured"
    warnings: tuple[str, ...] = ()
    narrow: str | None = None

    def record(self, reference: WalkedModel, store: OutputStore, *, floor: bool = True, progress: bool = False) -> None:
        """Run the reference over all parts and put what it gave on disk; with `floor`, in its own dtype as well.

        Raises:
            DiskError: The disk has too little room for what the reference gives, or it cannot be written.
        """
        numbers = [sum(a.size for a in part.arrays) for part in self.parts]
        with _measuring(reference, "reference", len(self.parts), progress) as bar:
            for i, part in enumerate(self.parts):
                arrays = self._run(reference, part)
                if i == 0:
                    store.reserve(sum(a.nbytes for a in arrays) * sum(numbers) // max(1, numbers[0]))
                store.put(arrays)
                bar.advance()
        if floor:
            self._measure_floor(reference)

    def judge(self, model: WalkedModel, store: OutputStore, *, progress: bool = False) -> Accuracy:
        """Run the quantized model over all parts and compare with what was recorded."""
        return self._compare(model, store.get, progress)

    def side_by_side(self, model: WalkedModel, reference: WalkedModel, *, progress: bool = False) -> Accuracy:
        """Compare two models that are both at hand; nothing is written to disk."""

        def outputs(i: int) -> list[mx.array]:
            with reference.exactly():
                return self._run(reference, self.parts[i])

        self._measure_floor(reference)
        return self._compare(model, outputs, progress)

    def _run(self, model: WalkedModel, part: Batch) -> list[mx.array]:
        if self.kind == "loss":
            assert self.loss is not None
            arrays = [mean_loss(part.call(self.loss, model.model, through=widen))]
        else:
            output = part.inputs.call(model.model, through=widen)
            self.narrow = self.narrow or narrow_dtype(output)
            arrays = [logits_of(output)] if self.kind == "tokens" else output_arrays(output)
        mx.eval(arrays)
        return arrays

    def _compare(self, model: WalkedModel, reference: Callable[[int], list[mx.array]], progress: bool) -> Accuracy:
        rows: list[Any] = []
        with _measuring(model, "accuracy", len(self.parts), progress) as bar:
            sequence = 0
            for i, part in enumerate(self.parts):
                before, after = reference(i), self.answers(model, i)
                if self.kind == "loss":
                    rows.append((number(before[0]), number(after[0])))
                elif self.kind == "outputs":
                    rows.append(compare_outputs(before, after))
                else:
                    rows.append(compare_tokens(before[0], after[0], part.shifted[1], sequence))
                    sequence += part.arguments[0].shape[0]
                bar.advance()
        context = {"arithmetic": self._arithmetic(model), "warnings": self.warnings}
        if self.kind == "loss":
            return summarise_losses([a for a, _ in rows], [b for _, b in rows], **context)
        if self.kind == "outputs":
            return summarise_outputs(rows, **context)
        return summarise_tokens(
            join_figures(rows),
            noise_floor=self.noise_floor,
            noise_floor_tokens=self.noise_floor_tokens,
            noise_floor_same_top=self.noise_floor_same_top,
            no_noise_floor=self.no_noise_floor,
            **context,
        )

    def _arithmetic(self, model: WalkedModel) -> str:
        if self.narrow is not None:
            return f"computed in float32, but the model itself rounds its outputs to {self.narrow}"
        if model.unpacked_on_cpu:
            return "float32, packed weights unpacked, since MLX multiplies by packed ones slowly on CPUs"
        return "float32"

    def answers(self, model: WalkedModel, i: int) -> list[mx.array]:
        """The quantized model's answer to a part, evaluated; what the reference could do, it may not be able to.

        Raises:
            QuantizationError: The model, quantized, cannot be called.
        """
        try:
            return self._run(model, self.parts[i])
        except FAULTS as error:
            raise QuantizationError(
                f"The unquantized model could be called with part {i + 1} of {len(self.parts)} of the evaluation, the "
                f"quantized one cannot: {type(error).__name__}: {error}"
            ) from error

    def _measure_floor(self, reference: WalkedModel) -> None:
        """The divergence between the reference in its own dtype and in float32: rounding alone."""
        if self.kind != "tokens":
            return
        if not any(a.dtype in HALVES for s in reference.sites for a in own_arrays(s.module).values()):
            self.no_noise_floor = "the weights are float32"
            return
        if reference.unpacked_on_cpu:
            self.no_noise_floor = "not measured: MLX multiplies by packed weights slowly on CPUs"
            return
        left = _FLOOR_TOKENS_CPU if computes_on_cpu() else _FLOOR_TOKENS
        rows: list[TokenFigures] = []
        for part in self.parts:
            inputs, targets = part.shifted
            count = min(left, targets.shape[1])  # of a long sequence its beginning, which is a sequence as well
            inputs, targets = (array[: left // count, :count] for array in (inputs, targets))
            try:
                with reference.evaluation_mode():
                    own = logits_of(reference.model(inputs))
                    mx.eval(own)
                with reference.exactly():
                    wide = logits_of(reference.model(inputs))
                    mx.eval(wide)
            except RuntimeError as error:  # such as a stack of experts in bfloat16 on a CPU
                self.no_noise_floor = f"not measured: MLX cannot run the model in its own dtype here ({error})"
                return
            rows.append(compare_tokens(wide, own, targets, 0))
            left -= targets.size
            if left <= 0:
                break
        floor = summarise_tokens(join_figures(rows))
        self.noise_floor, self.noise_floor_tokens, self.no_noise_floor = floor.mean_kl, floor.tokens, None
        self.noise_floor_same_top = floor.same_top


def prepare_evaluation(
    model: WalkedModel, batches: list[Batch], loss: Loss | None = None, *, warnings: tuple[str, ...] = ()
) -> Evaluation:
    """Find out what kind of model it is, by calling it once, and cut its batches into parts that fit.

    Args:
        model: The reference.
        batches: The batches, as `resolve` gives them.
        loss: The caller's loss, if any.
        warnings: Reasons to doubt what will be measured.

    Raises:
        QuantizationError: The model cannot be called with the batches, or gives back nothing to compare.
    """
    if loss is not None:
        return Evaluation("loss", batches, loss, warnings=warnings)
    first = batches[0]
    if first.tokens is not None:
        highest = max(int(number(mx.max(b.tokens))) for b in batches if b.tokens is not None)
        lowest = min(int(number(mx.min(b.tokens))) for b in batches if b.tokens is not None)
        rows = max((weight_shape(s.module)[0] for s in model.sites if isinstance(s.module, EMBEDDINGS)), default=None)
        # MLX reads past the end of a table without a word, so the call is tried with tokens that are in it.
        probe = first.tokens[:1, :-1] if rows is None else mx.clip(first.tokens[:1, :-1], 0, rows - 1)
        logits = logits_of(_call(model, Batch((probe,), None)))
        if logits.ndim == 3 and logits.shape[:2] == probe.shape:
            vocabulary = logits.shape[2]
            if highest >= vocabulary and rows is not None and highest >= rows:
                raise QuantizationError(
                    f"evaluation holds token {highest}, but the model's vocabulary ends at {vocabulary - 1}: these are "
                    "another tokenizer's tokens."
                )
            if highest < vocabulary and lowest < 0:
                raise QuantizationError(
                    f"evaluation holds token {lowest}: padding would be judged as text. Cut the sequences to one "
                    "length instead, or pass them one by one."
                )
            if highest < vocabulary:
                if any(b.tokens is None for b in batches):
                    raise QuantizationError("evaluation mixes token arrays with other batches: pass one kind.")
                longest = max(b.tokens.shape[1] for b in batches if b.tokens is not None)
                at_once = max(1, LOGITS_AT_ONCE // (vocabulary * longest))
                parts = [part for batch in batches for part in rows_at_most(batch, at_once)]
                return Evaluation("tokens", parts, warnings=warnings)
    found = output_arrays(_call(model, first))
    if not found:
        raise QuantizationError(
            "The model's output for evaluation[0] holds no floating point array to compare. "
            "Pass loss=..., a function loss(model, *batch) that gives back a number."
        )
    return Evaluation("outputs", batches, warnings=warnings)


class Watched:
    """The answers of a model as it is now, on disk, to tell how far those that it gives later have moved.

    Args:
        model: The model.
        batches: The batches to call it with.
        loss: The caller's loss.

    Attributes:
        evaluation: The evaluation that both are compared by.
    """

    def __init__(self, model: WalkedModel, batches: list[Batch], loss: Loss | None = None) -> None:
        """Find out how the model takes the batches."""
        self._model = model
        self._store = OutputStore()
        self._shares: dict[int, mx.array] = {}
        self.evaluation = prepare_evaluation(model, batches, loss)

    def __enter__(self) -> Callable[[], float]:
        """Run the model as it is, and hand on the function that tells its divergence from that."""
        self.evaluation.record(self._model, self._store, floor=False)
        return self.divergence

    def __exit__(self, *_: object) -> None:
        """Forget the answers."""
        self._shares.clear()
        self._store.__exit__()

    def divergence(self) -> float:
        """The divergence of the model as it is by now; of a loss, the loss itself. The model is run once."""
        if self.evaluation.kind != "tokens":
            return divergence_of(self.evaluation.judge(self._model, self._store))
        total, tokens = 0.0, 0
        with self._model.exactly():
            for i, part in enumerate(self.evaluation.parts):
                before, after = self._store.get(i)[0], self.evaluation.answers(self._model, i)[0]
                total_here, tokens_here = self._of_tokens(i, before, after, part.shifted[1])
                total, tokens = total + total_here, tokens + tokens_here
        return total / tokens if tokens else math.nan

    def _of_tokens(self, i: int, before: mx.array, after: mx.array, targets: mx.array) -> tuple[float, int]:
        """The sum of a part's divergences, and the number of tokens that have one."""
        if before.shape == after.shape:
            wide = before.astype(mx.float32)
            found = quick_divergences(wide, self._shares_of(i, wide), after.astype(mx.float32))
            if math.isfinite(total := number(found.sum())):
                return total, found.size
        figures = compare_tokens(before, after, targets, 0)
        return float(figures.kl[figures.usable].sum()), int(figures.usable.sum())

    def _shares_of(self, i: int, logits: mx.array) -> mx.array:
        """The softmax of a part's logits, kept where there is room."""
        if i in self._shares:
            return self._shares[i]
        shares = mx.softmax(logits, axis=-1)
        shares = shares / shares.sum(axis=-1, keepdims=True)
        mx.eval(shares)
        if sum(a.nbytes for a in self._shares.values()) + shares.nbytes <= ROOM_BYTES:
            self._shares[i] = shares
        return shares


def perplexity(model: nn.Module, batches: list[Batch]) -> float:
    """The perplexity of a model that predicts tokens, computed as in reports.

    Args:
        model: Unquantized or quantized.
        batches: Token batches.

    Returns:
        The exponential of the mean negative log-likelihood, over all predicted tokens.
    """
    walked = WalkedModel(model)
    comparison = prepare_evaluation(walked, resolve(walked, batches, "evaluation"))
    if comparison.kind != "tokens":
        raise QuantizationError("The model gives no logits [batch, length, vocabulary], so it has no perplexity.")
    total, count = 0.0, 0
    with _measuring(walked, "perplexity", len(comparison.parts), False):
        for part in comparison.parts:
            inputs, targets = part.shifted
            logits = logits_of(model(inputs)).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, targets)
            total += number(losses.sum())
            count += targets.size
    return math.exp(total / count)


def _call(model: WalkedModel, batch: Batch) -> object:
    with model.exactly():
        try:
            output = batch.call(model.model, through=widen)
            several = output if isinstance(output, (tuple, list)) else [output]
            mx.eval([leaf for leaf in several if isinstance(leaf, mx.array)])
        except FAULTS as error:
            raise uncallable(batch, "evaluation", error) from error
    return output


@contextmanager
def _measuring(model: WalkedModel, what: str, total: int, progress: bool) -> Iterator[Bar]:
    with model.exactly(), progress_bar(f"measuring {what}", total, enabled=progress) as bar:
        yield bar
