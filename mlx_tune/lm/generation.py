"""`lm.autobatch_generate`: the largest batch for mlx-lm's batched generation, and the rate at each size."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlx_tune.errors import BudgetError, InvalidArgumentError
from mlx_tune.lm.generation_result import GenerationBatchResult, GenerationTrial
from mlx_tune.memory import MemoryBudget, resolve_budget, track_memory
from mlx_tune.progress import progress_bar
from mlx_tune.state import same_training
from mlx_tune.units import Budget, format_bytes

if TYPE_CHECKING:
    import mlx.nn as nn


#: What further rows are predicted to add is raised by this share before it is compared with the budget.
_MARGIN = 0.05

#: How many prompts mlx-lm's batch generator works on at a time.
PREFILL_ROWS = 8


def autobatch_generate(
    model: nn.Module,
    *,
    prompt_tokens: int,
    max_tokens: int,
    budget: Budget = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    max_batch: int | None = None,
    prefill_step_size: int = 2048,
    steps: int = 8,
    progress: bool = True,
) -> GenerationBatchResult:
    """Find the largest batch that mlx-lm can generate with in a memory budget, and how fast each size is.

    A batch is judged by its worst moments: the last prompts being read while all other rows hold theirs, and the last
    tokens being written while the cache of every row has its final length. The cache is filled without generating
    all tokens in between, so that a trial costs little more than reading one prompt and writing `steps` tokens.

    Larger batches give more tokens a second in all, and later tokens to each row. The result has both figures for
    each size: a user who waits for one answer wants batch 1, one who has many to make wants the knee.

    Args:
        model: A language model of mlx-lm, quantized or not.
        prompt_tokens: Tokens in a prompt, of the longest one.
        max_tokens: Tokens to generate for each.
        budget: Bytes, text such as "24GB", a share of what is free, or None for `memory_budget()`.
        kv_bits: Keep keys and values in so many bits, as `mlx_lm.generate --kv-bits` does. mlx-lm's batch generator
            has no quantized cache: what is measured then is the model's own forward pass on such a cache.
        kv_group_size: Values that share a scale in a quantized cache.
        max_batch: The largest batch to consider; None for none.
        prefill_step_size: Tokens of a prompt that are read at a time.
        steps: Tokens that are timed; the fastest counts.
        progress: Show what is being tried.

    Returns:
        The largest batch, the knee, and peak and rate of every size tried.

    Raises:
        InvalidArgumentError: A number below 1, a cache that cannot be quantized, or an architecture whose code in
            mlx-lm does not take a batch, or a quantized cache; the text names it.
        BudgetError: Not even one row fits.

    Examples:
        ```python
        result = lm.autobatch_generate(model, prompt_tokens=512, max_tokens=256, budget="24GB")
        mlx_lm.batch_generate(model, tokenizer, prompts, completion_batch_size=result.batch_size)
        ```
    """
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("max_tokens", max_tokens),
        ("prefill_step_size", prefill_step_size),
        ("steps", steps),
        ("max_batch", 1 if max_batch is None else max_batch),
    ):
        if value < 1:
            raise InvalidArgumentError(f"{name}={value}: it must be at least 1.")
    allowed = resolve_budget(budget)
    started = time.perf_counter()
    with _evaluating(model), progress_bar("autobatch_generate", enabled=progress) as bar:
        rows = _Rows(
            model, prompt_tokens, max_tokens, kv_bits, kv_group_size, prefill_step_size, min(steps, max_tokens)
        )

        def measure(size: int, predicted: int | None) -> GenerationTrial:
            bar.update(text=f"trying batch size {size}")
            trial = rows.trial(size, predicted, int(allowed))
            fits = "fits" if trial.fits else "does not fit"
            bar.ended(f"batch size {size}: {fits}, peak {format_bytes(trial.peak_bytes)}")
            return trial

        trials, next_bytes = grow(measure, int(allowed), max_batch, rows.resident_bytes)
    if not trials[-1].fits and len(trials) == 1:
        raise _too_large(trials[0], allowed)
    return GenerationBatchResult(
        batch_size=max(trial.batch_size for trial in trials if trial.fits),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        kv_bits=kv_bits,
        cache_bytes_per_row=rows.bytes_per_row,
        budget_bytes=int(allowed),
        budget_source=str(allowed),
        trials=tuple(sorted(trials, key=lambda trial: trial.batch_size)),
        next_bytes=next_bytes,
        search_seconds=time.perf_counter() - started,
        notes=rows.notes,
    )


def grow(
    measure: Callable[[int, int | None], GenerationTrial],
    budget_bytes: int,
    max_batch: int | None,
    resident_bytes: int = 0,
) -> tuple[list[GenerationTrial], int | None]:
    """Double the batch for as long as the next size is predicted to fit, then close in on the last one that does.

    A cache grows by the same bytes for each row, so that the line through two measured sizes foretells the others.

    Args:
        measure: Measures a size, given the peak that is predicted for it.
        budget_bytes: The limit of peaks.
        max_batch: The largest size; None for none.
        resident_bytes: The memory that is held without any row: the model.

    Returns:
        The trials in order, and the peak predicted for the size after the answer; None where that was tried, or the
        answer is `max_batch`.
    """
    trials = [measure(1, None)]
    if not trials[0].fits:
        return trials, None
    best, too_many = 1, None if max_batch is None else max_batch + 1
    while True:
        last = 2 * best if too_many is None else min(2 * best, too_many - 1)
        fitting = [n for n in range(best + 1, last + 1) if foretell(trials, n, resident_bytes) <= budget_bytes]
        if not fitting:
            break
        size = fitting[-1]
        trials.append(measure(size, foretell(trials, size, resident_bytes)))
        if trials[-1].fits:
            best = size
        else:
            too_many = size
    known = best == max_batch or any(trial.batch_size == best + 1 for trial in trials)
    return trials, None if known else foretell(trials, best + 1, resident_bytes)


def foretell(trials: list[GenerationTrial], size: int, resident_bytes: int) -> int:
    """The peak that a size is predicted to have, with its margin, from at least one trial."""
    points = [(0, resident_bytes), *sorted((trial.batch_size, trial.peak_bytes) for trial in trials)]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    # Prompts are read a few at a time, so that rows need more at first than later; the steeper of the last two counts.
    high, high_bytes = points[-1]
    added = max(0.0, *slopes[-2:]) if len(slopes) > 1 else max(0.0, slopes[0])
    return int(high_bytes + added * (size - high) * (1 + _MARGIN))


class _Rows:
    """Rows of a batch with their caches filled, made out of one row that was read once."""

    def __init__(
        self,
        model: nn.Module,
        prompt_tokens: int,
        max_tokens: int,
        kv_bits: int | None,
        kv_group_size: int,
        prefill_step_size: int,
        steps: int,
    ) -> None:
        import mlx.core as mx

        self._model, self._steps, self._prefill = model, steps, prefill_step_size
        self._bits, self._group = kv_bits, kv_group_size
        self._prompt = prompt_tokens
        self.notes: tuple[str, ...] = ()
        if kv_bits is not None:
            self.notes = (
                "mlx-lm's batch generator has no quantized cache: the model's own forward pass was measured on one.",
            )
        self._read = self._filled(max(1, prompt_tokens - 1))
        # The generator of mlx-lm writes one token more than it hands out.
        self._late = self._filled(max(1, prompt_tokens + max_tokens - steps - 1))
        mx.eval([cache.state for cache in self._late], [cache.state for cache in self._read])
        self.bytes_per_row = sum(int(cache.nbytes) for cache in self._late)
        # These two rows are what trials are made of; no generation would hold them, so they are taken off its peaks.
        self._own_bytes = self.bytes_per_row + sum(int(cache.nbytes) for cache in self._read)
        mx.clear_cache()
        self.resident_bytes = mx.get_active_memory() - self._own_bytes

    def trial(self, size: int, predicted: int | None, budget_bytes: int) -> GenerationTrial:
        """Measure one batch size."""
        import mlx.core as mx

        mx.clear_cache()
        try:
            with track_memory() as reading:
                self._read_prompts(size)
            mx.clear_cache()
            with track_memory() as writing:
                seconds = min(self._write(size))
        except (ValueError, TypeError) as error:  # shapes and types that the architecture's own code does not expect
            cache = "" if self._bits is None else f" on a {self._bits}-bit cache"
            raise InvalidArgumentError(
                f"mlx-lm's {type(self._model).__module__} does not generate in a batch of {size}{cache}: {error}"
            ) from error
        prompt_peak = reading.peak_bytes - self._own_bytes
        peak = max(prompt_peak, writing.peak_bytes - self._own_bytes)
        mx.clear_cache()
        return GenerationTrial(
            batch_size=size,
            predicted_bytes=predicted,
            prompt_peak_bytes=prompt_peak,
            peak_bytes=peak,
            seconds=seconds,
            fits=peak <= budget_bytes,
        )

    def _filled(self, length: int, rows: int = 1) -> list[Any]:
        """Caches after so many tokens in each of some rows, read in parts as a prompt is, and then quantized."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        caches: list[Any] = make_prompt_cache(self._model)
        tokens = mx.zeros((rows, length), mx.int32)
        while tokens.shape[1] > 0:
            self._model(tokens[:, : self._prefill], cache=caches)
            mx.eval([cache.state for cache in caches])
            tokens = tokens[:, self._prefill :]
        return caches if self._bits is None else quantized_caches(caches, self._bits, self._group)

    def _read_prompts(self, size: int) -> None:
        """The last prompts being read, while every other row holds its own."""
        first = min(size, PREFILL_ROWS)
        if self._bits is not None:
            others = [_repeated(cache, size - first) for cache in self._read] if size > first else []
            self._forward_prompts(first)
            del others
            return
        with self._generator(size) as generator:
            if size > first:
                generator.insert([[0]] * (size - first), [4] * (size - first), caches=[self._read] * (size - first))
                generator.next()
            generator.insert([[0] * self._prompt] * first, [1] * first)
            while len(generator.next()[1]) < size:
                pass  # answers come once all rows are writing

    def _forward_prompts(self, rows: int) -> None:
        import mlx.core as mx

        mx.eval([cache.state for cache in self._filled(self._prompt, rows)])

    def _write(self, size: int) -> Iterator[float]:
        """Seconds for each of the last tokens."""
        if self._bits is not None:
            yield from self._forward_tokens(size)
            return
        with self._generator(size) as generator:
            generator.insert([[0]] * size, [self._steps + 1] * size, caches=[self._late] * size)
            while not generator.next()[1]:
                pass
            for _ in range(self._steps):
                started = time.perf_counter()
                generator.next()
                yield time.perf_counter() - started

    def _forward_tokens(self, size: int) -> Iterator[float]:
        import mlx.core as mx

        caches = [_repeated(cache, size) for cache in self._late]
        tokens = mx.zeros((size, 1), mx.int32)
        for _ in range(self._steps):
            started = time.perf_counter()
            tokens = mx.argmax(self._model(tokens, cache=caches)[:, -1:], axis=-1).astype(mx.int32)
            mx.eval(tokens)
            yield time.perf_counter() - started

    @contextmanager
    def _generator(self, size: int) -> Iterator[Any]:
        """mlx-lm's batch generator with room for all rows; the wired limit that it raises is put back."""
        from mlx_lm.generate import BatchGenerator

        generator = BatchGenerator(
            self._model,
            completion_batch_size=size,
            prefill_batch_size=min(size, PREFILL_ROWS),
            prefill_step_size=self._prefill,
        )
        try:
            yield generator
        finally:
            generator.close()


def quantized_caches(caches: list[Any], bits: int, group_size: int) -> list[Any]:
    """Caches as mlx-lm quantizes them once a prompt is read.

    Args:
        caches: One for each layer that has keys and values.
        bits: Bits of a key or value.
        group_size: Those that share a scale.

    Raises:
        InvalidArgumentError: mlx-lm cannot quantize one of them, or not so.
    """
    done = []
    for cache in caches:
        if not hasattr(cache, "to_quantized"):
            raise InvalidArgumentError(
                f"kv_bits={bits}: this model has a {type(cache).__name__}, which mlx-lm cannot quantize."
            )
        try:
            done.append(cache.to_quantized(group_size=group_size, bits=bits))
        except (NotImplementedError, ValueError) as error:
            raise InvalidArgumentError(
                f"kv_bits={bits}, kv_group_size={group_size}: the cache cannot be quantized so: {error}."
            ) from error
    return done


def _repeated(cache: Any, rows: int) -> object:
    """A cache of one row as one of several equal rows."""
    import mlx.core as mx
    from mlx.utils import tree_map

    several = copy.copy(cache)
    several.state = tree_map(
        lambda leaf: mx.repeat(leaf, rows, axis=0) if isinstance(leaf, mx.array) else leaf, cache.state
    )
    mx.eval(several.state)
    return several


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, every module's own flag back afterwards."""
    with same_training(model):
        model.eval()
        yield


def _too_large(trial: GenerationTrial, budget: MemoryBudget) -> BudgetError:
    return BudgetError(
        f"One row does not fit: generating takes {format_bytes(trial.peak_bytes)}, the budget is {budget}.",
        needed_bytes=trial.peak_bytes,
        budget_bytes=int(budget),
    )
