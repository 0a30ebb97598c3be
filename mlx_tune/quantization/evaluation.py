"""Running a reference and a quantized model on the same batches, one after the other or side by side."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.quantization.accuracy import (
    Accuracy,
    OutputFigures,
    TokenFigures,
    summarise_losses,
    summarise_outputs,
    summarise_tokens,
)
from mlx_tune.quantization.arithmetic import evaluation_mode, float32_arithmetic, unpacked_on_cpu, widen
from mlx_tune.quantization.batches import Batch, rows_at_most
from mlx_tune.quantization.lazy import number
from mlx_tune.quantization.sites import own_arrays, walk

#: Logits looked at together: float32 temporaries several times this size come and go.
_LOGITS_AT_ONCE = 1 << 24

#: Tokens that the noise floor is measured on; fewer on a CPU, which multiplies half-precision numbers slowly.
_FLOOR_TOKENS, _FLOOR_TOKENS_CPU = 2048, 256

#: `loss(model, *arguments)`: a scalar, or an array of which the mean counts.
Loss = Callable[..., Any]


class OutputStore:
    """A reference's outputs on disk, so that the reference itself need not stay in memory.

    Examples:
        >>> with OutputStore() as store:
        ...     store.put([mx.ones(2)])
        ...     [array.tolist() for array in store.get(0)]
        [[1.0, 1.0]]
    """

    def __init__(self) -> None:
        """Nothing is written yet."""
        self._folder: Path | None = None
        self._count = 0

    def __enter__(self) -> OutputStore:
        """Make the folder."""
        self._folder = Path(tempfile.mkdtemp(prefix="mlx_tune-outputs-"))
        return self

    def __exit__(self, *_: object) -> None:
        """Delete everything."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def put(self, arrays: list[mx.array]) -> None:
        """Write one batch's arrays after those before."""
        assert self._folder is not None
        named = {f"{i:03d}": array for i, array in enumerate(arrays)}
        mx.save_safetensors(str(self._folder / f"{self._count}.safetensors"), named)
        self._count += 1

    def get(self, i: int) -> list[mx.array]:
        """Read a batch's arrays back."""
        assert self._folder is not None
        loaded: Any = mx.load(str(self._folder / f"{i}.safetensors"))
        return [loaded[name] for name in sorted(loaded)]

    def __len__(self) -> int:
        """How many batches it holds."""
        return self._count


@dataclass
class Comparison:
    """One evaluation: of which kind, on which batches, and what was measured of the reference on its own.

    Attributes:
        kind: "tokens", "loss" or "outputs".
        parts: What the models are called with, in parts that fit.
        loss: The caller's loss.
        noise_floor: Half precision's own divergence, where measured.
        noise_floor_tokens: Tokens that it was measured on.
        warnings: Reasons to doubt the figures.
    """

    kind: str
    parts: list[Batch]
    loss: Loss | None = None
    noise_floor: float | None = None
    noise_floor_tokens: int = 0
    warnings: tuple[str, ...] = ()

    def record(self, reference: nn.Module, store: OutputStore, *, floor: bool = True, progress: bool = False) -> None:
        """Run the reference over all parts and put what it gave on disk; with `floor`, in its own dtype as well."""
        with _measuring(reference, "reference", len(self.parts), progress) as bar:
            for part in self.parts:
                store.put(self._run(reference, part))
                bar.advance()
        if floor:
            self._measure_floor(reference, store.get)

    def judge(self, model: nn.Module, store: OutputStore, *, progress: bool = False) -> Accuracy:
        """Run the quantized model over all parts and compare with what was recorded."""
        return self._compare(model, store.get, progress)

    def side_by_side(self, model: nn.Module, reference: nn.Module, *, progress: bool = False) -> Accuracy:
        """Compare two models that are both at hand; nothing is written to disk."""

        def outputs(i: int) -> list[mx.array]:
            with evaluation_mode(reference), float32_arithmetic(reference):
                return self._run(reference, self.parts[i])

        self._measure_floor(reference, outputs)
        return self._compare(model, outputs, progress)

    def _run(self, model: nn.Module, part: Batch) -> list[mx.array]:
        if self.kind == "loss":
            assert self.loss is not None
            arrays = [mx.mean(self.loss(model, *widen(part.arguments)))]
        elif self.kind == "tokens":
            arrays = [logits_of(model(part.shifted[0]))]
        else:
            arrays = output_arrays(model(*widen(part.arguments)))
        mx.eval(arrays)
        return arrays

    def _compare(self, model: nn.Module, reference: Callable[[int], list[mx.array]], progress: bool) -> Accuracy:
        rows: list[Any] = []
        with _measuring(model, "accuracy", len(self.parts), progress) as bar:
            context = {"arithmetic": _arithmetic(model), "warnings": self.warnings}
            sequence = 0
            for i, part in enumerate(self.parts):
                before, after = reference(i), self._run(model, part)
                if self.kind == "loss":
                    rows.append((number(before[0]), number(after[0])))
                elif self.kind == "outputs":
                    rows.append(compare_outputs(before, after))
                else:
                    rows.append(compare_tokens(before[0], after[0], part.shifted[1], sequence))
                    sequence += part.arguments[0].shape[0]
                bar.advance()
        if self.kind == "loss":
            return summarise_losses([a for a, _ in rows], [b for _, b in rows], **context)
        if self.kind == "outputs":
            return summarise_outputs(rows, **context)
        return summarise_tokens(
            join_figures(rows),
            noise_floor=self.noise_floor,
            noise_floor_tokens=self.noise_floor_tokens,
            **context,
        )

    def _measure_floor(self, reference: nn.Module, wide: Callable[[int], list[mx.array]]) -> None:
        """The divergence between the reference in its own dtype and in float32: rounding alone."""
        low = any(a.dtype in (mx.bfloat16, mx.float16) for s in walk(reference) for a in own_arrays(s.module).values())
        if self.kind != "tokens" or not low or unpacked_on_cpu(reference):
            return
        wanted = _FLOOR_TOKENS_CPU if mx.default_device() == mx.Device(mx.cpu) else _FLOOR_TOKENS
        rows, sequence = [], 0
        for i, part in enumerate(self.parts):
            inputs, targets = part.shifted
            count = max(1, (wanted - self.noise_floor_tokens) // targets.shape[1])
            with evaluation_mode(reference):
                own = logits_of(reference(inputs[:count]))
            rows.append(compare_tokens(wide(i)[0][:count], own, targets[:count], sequence))
            sequence += own.shape[0]
            self.noise_floor_tokens += targets[:count].size
            if self.noise_floor_tokens + targets.shape[1] > wanted:
                break
        self.noise_floor = summarise_tokens(join_figures(rows)).mean_kl


def prepare(model: nn.Module, batches: list[Batch], loss: Loss | None, *, warnings: tuple[str, ...] = ()) -> Comparison:
    """Find out what kind of model it is, by calling it once, and cut its batches into parts that fit.

    Args:
        model: The reference.
        batches: What `read_batches` gave.
        loss: The caller's loss, if any.
        warnings: Reasons to doubt what will be measured.

    Raises:
        QuantizationError: The model cannot be called with the batches, or gives back nothing to compare.
    """
    if loss is not None:
        return Comparison("loss", batches, loss, warnings=warnings)
    first = batches[0]
    if first.tokens is not None:
        probe = Batch((first.tokens[:1],), first.tokens[:1])
        with evaluation_mode(model), float32_arithmetic(model):
            logits = logits_of(_call(model, (probe.shifted[0],)))
        rows, length = probe.shifted[0].shape
        highest = max(int(number(mx.max(b.tokens))) for b in batches if b.tokens is not None)
        if logits.ndim == 3 and logits.shape[:2] == (rows, length) and logits.shape[2] > highest:
            at_once = max(1, _LOGITS_AT_ONCE // (logits.shape[2] * max(b.tokens.shape[1] for b in batches)))  # type: ignore[union-attr]
            if any(b.tokens is None for b in batches):
                raise QuantizationError("evaluation mixes token arrays with other batches: pass one kind.")
            parts = [part for batch in batches for part in rows_at_most(batch, at_once)]
            return Comparison("tokens", parts, warnings=warnings)
    with evaluation_mode(model), float32_arithmetic(model):
        found = output_arrays(_call(model, widen(first.arguments)))
    if not found:
        raise QuantizationError(
            "The model's output for evaluation[0] holds no floating point array to compare. "
            "Pass loss=..., a function loss(model, *batch) that gives back a number."
        )
    return Comparison("outputs", batches, warnings=warnings)


def perplexity(model: nn.Module, batches: list[Batch]) -> float:
    """The perplexity of a model that predicts tokens, computed as in reports.

    Args:
        model: Unquantized or quantized.
        batches: Token batches.

    Returns:
        The exponential of the mean negative log-likelihood, over all predicted tokens.
    """
    comparison = prepare(model, batches, None)
    if comparison.kind != "tokens":
        raise QuantizationError("The model gives no logits [batch, length, vocabulary], so it has no perplexity.")
    total, count = 0.0, 0
    with _measuring(model, "perplexity", len(comparison.parts), False):
        for part in comparison.parts:
            inputs, targets = part.shifted
            logits = logits_of(model(inputs)).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, targets)
            total += number(losses.sum())
            count += targets.size
    return math.exp(total / count)


def logits_of(output: Any) -> Any:
    """The logits in what a model gave back: itself, its `.logits`, or the first of several."""
    if isinstance(output, mx.array):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = logits_of(output[0])
    if not isinstance(found, mx.array):
        return mx.zeros((0,))
    return found


def output_arrays(output: Any) -> list[mx.array]:
    """Every floating point array in what a model gave back, as float32."""
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(
        getattr(output, "__dict__", output) if not isinstance(output, (dict, list, tuple, mx.array)) else output
    )
    arrays = [leaf for _, leaf in flat if isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)]
    return [array.astype(mx.float32) for array in arrays]


def compare_outputs(before: list[mx.array], after: list[mx.array]) -> OutputFigures:
    """Sums over the numbers that are finite in both models' outputs.

    Raises:
        QuantizationError: The outputs have different shapes.
    """
    if [a.shape for a in before] != [a.shape for a in after]:
        raise QuantizationError(
            f"The models' outputs differ in shape: {[a.shape for a in before]} and {[a.shape for a in after]}."
        )
    sums, values, lost = [0.0] * 4, 0, 0
    for x, y in zip(before, after, strict=True):
        finite = mx.isfinite(x) & mx.isfinite(y)
        x, y = mx.where(finite, x, 0), mx.where(finite, y, 0)
        found = [(x * y).sum(), mx.square(x).sum(), mx.square(y).sum(), mx.square(x - y).sum()]
        sums = [s + number(f) for s, f in zip(sums, found, strict=True)]
        here = int(number(finite.sum()))
        values, lost = values + here, lost + x.size - here
    return OutputFigures(sums[0], sums[1], sums[2], sums[3], values, lost)


def compare_tokens(before: mx.array, after: mx.array, targets: mx.array, first_sequence: int) -> TokenFigures:
    """Divergences, agreement and likelihoods of every token.

    Args:
        before: The reference's logits [batch, length, vocabulary].
        after: The model's.
        targets: The tokens that came [batch, length].
        first_sequence: The number of the first row.

    Raises:
        QuantizationError: The vocabularies differ.
    """
    import numpy as np

    if before.shape != after.shape:
        raise QuantizationError(
            f"The models' logits differ in shape: {before.shape} and {after.shape}. Both must have one vocabulary."
        )
    batch, length, vocabulary = before.shape
    step = max(1, _LOGITS_AT_ONCE // 4 // vocabulary)
    x, y = before.reshape(-1, vocabulary), after.reshape(-1, vocabulary)
    wanted = targets.reshape(-1)
    columns: list[list[Any]] = [[] for _ in range(7)]
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        found = _token_figures(x[part].astype(mx.float32), y[part].astype(mx.float32), wanted[part])
        mx.eval(found)
        for column, values in zip(columns, found, strict=True):
            column.append(np.array(values.astype(mx.float32), dtype=np.float64))
    sequence = np.repeat(np.arange(first_sequence, first_sequence + batch), length)
    figures: list[Any] = [*(np.concatenate(c) for c in columns), sequence]
    return TokenFigures(*figures)


def join_figures(parts: list[TokenFigures]) -> TokenFigures:
    """The figures of several batches, one after the other."""
    import numpy as np

    names = ("kl", "reverse_kl", "same_top", "nll_before", "nll_after", "confidence", "finite", "sequence")
    return TokenFigures(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _token_figures(x: mx.array, y: mx.array, targets: mx.array) -> list[mx.array]:
    # Minus infinity is a masked token, and no fault; NaN and plus infinity are.
    finite = ~((mx.isnan(x) | mx.isposinf(x)) | (mx.isnan(y) | mx.isposinf(y))).any(axis=-1)
    lx = x - mx.logsumexp(x, axis=-1, keepdims=True)
    ly = y - mx.logsumexp(y, axis=-1, keepdims=True)
    px, py = mx.exp(lx), mx.exp(ly)
    kl = mx.where(px > 0, px * (lx - ly), 0).sum(axis=-1)
    reverse = mx.where(py > 0, py * (ly - lx), 0).sum(axis=-1)
    same = x.argmax(axis=-1) == y.argmax(axis=-1)
    at = targets[:, None].astype(mx.int32)
    before = -mx.take_along_axis(lx, at, axis=-1)[:, 0]
    after = -mx.take_along_axis(ly, at, axis=-1)[:, 0]
    return [kl, reverse, same, before, after, px.max(axis=-1), finite]


def _call(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    try:
        output = model(*arguments)
        mx.eval(
            [leaf for leaf in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(leaf, mx.array)]
        )
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        shapes = ", ".join(str(list(a.shape)) if isinstance(a, mx.array) else type(a).__name__ for a in arguments)
        raise QuantizationError(
            f"The model cannot be called with evaluation[0] ({shapes}): {error}. Batches are what the model is called "
            "with: token arrays [batch, length], which are shifted here, or tuples of arguments."
        ) from error
    return output


@contextmanager
def _measuring(model: nn.Module, what: str, total: int, progress: bool) -> Iterator[Bar]:
    with (
        evaluation_mode(model),
        float32_arithmetic(model),
        progress_bar(f"measuring {what}", total, enabled=progress) as bar,
    ):
        yield bar


def _arithmetic(model: nn.Module) -> str:
    if unpacked_on_cpu(model):
        return "float32, packed weights unpacked, since MLX multiplies by packed ones slowly on CPUs"
    return "float32"
