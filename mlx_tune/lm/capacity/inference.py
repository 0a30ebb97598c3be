"""Generation on a model that was never loaded: weights, caches, and the memory of reading and writing."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING

from mlx_tune.devices import Backend
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.capacity.caches import PREFILL, cache_arrays, filled_caches, with_arrays
from mlx_tune.lm.capacity.depth import START, Course
from mlx_tune.lm.capacity.growth import Largest, largest_foretold
from mlx_tune.lm.capacity.repetition import find_runs, kept_blocks
from mlx_tune.lm.capacity.result import GenerationFit
from mlx_tune.lm.capacity.tracing import course_of
from mlx_tune.lm.capacity.unloaded import Unloaded
from mlx_tune.lm.generation import PREFILL_ROWS
from mlx_tune.measuring.floors import Floor
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN
from mlx_tune.trees import nbytes_of

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

#: Blocks of each run in the shortest model, and how many more the longer ones have: the first blocks of a GPU's are
#: still in one command buffer with what comes before them.
_LEAST, _MORE = 6, 4
#: No batch and no context is looked for above these.
_MOST_ROWS, _MOST_TOKENS = 1 << 14, 1 << 20


class RunModel:
    """A model to generate with, of which short ones with fewer of its equal blocks are traced.

    Args:
        unloaded: Its configuration.
        backend: The backend that it is priced for.
        kv_bits: Bits of keys and values; None for the model's own dtype.
    """

    def __init__(self, unloaded: Unloaded, backend: Backend, kv_bits: int | None = None) -> None:
        whole = unloaded.build()
        unloaded = unloaded.completed(whole)
        kinds = unloaded.kinds(whole)
        self.weights_bytes, self._backend, self._kv_bits = nbytes_of(whole.parameters()), backend, kv_bits
        self._runs = find_runs(kinds, 2)
        base = [min(run.repeats, max(2, -(-_LEAST // run.period))) for run in self._runs]
        ends = [min(run.repeats, times + -(-_MORE // run.period)) for run, times in zip(self._runs, base, strict=True)]
        #: The repeats of each run that one more is worth, and that the shortest model lacks.
        self._steps = [(end - times) or 1 for end, times in zip(ends, base, strict=True)]
        self._missing = [run.repeats - times for run, times in zip(self._runs, base, strict=True)]
        #: The shortest model, and for each run one in which it comes more often.
        self._models = [whole]
        if any(self._missing):
            longer = [[ends[i] if i == run else times for i, times in enumerate(base)] for run in range(len(base))]
            keeps = [kept_blocks(len(kinds), self._runs, repeats) for repeats in (base, *longer)]
            self._models = [unloaded.build(keep) for keep in keeps]
            alike = [
                unloaded.kinds(model, keep) == [kinds[i] for i in keep]
                for model, keep in zip(self._models, keeps, strict=True)
            ]
            if not all(alike):
                self._models = [whole]

    def cache_bytes(self, rows: int, tokens: int, *, grown: bool = False) -> int:
        """Bytes of the caches; `grown` where they were joined without room and then grew."""

        def course(model: nn.Module) -> Course:
            held, more = (tokens - 1, 1) if grown else (tokens, 0)
            return Course({START: nbytes_of(cache_arrays(self._filled(model, rows, held, more, exact=grown)))})

        return self._deep(rows, course).start_bytes

    def reading(self, rows: int, context: int) -> Course:
        """The last part of the last prompts being read, while the other rows hold theirs."""
        first = min(rows, PREFILL_ROWS)
        last = min(PREFILL, context - 1)
        course = self._deep(first, lambda model: self._course(model, first, context - 1 - last, last, logits=False))
        others = (rows - first) * self.cache_bytes(1, context, grown=True) if rows > first else 0
        return Course({key: n + others for key, n in course.highest.items()})

    def writing(self, rows: int, context: int) -> Course:
        """The last token of every row, for which caches that were joined without room for it grow."""
        return self._deep(rows, lambda model: self._course(model, rows, context - 1, 1, logits=True))

    def floor(self, rows: int, context: int) -> Floor:
        """The peak of both, with the kinds of operations of both."""
        both = [self.reading(rows, context).floor, self.writing(rows, context).floor]
        return Floor(max(f.bytes for f in both), [n for f in both for n in f.live])

    def _deep(self, rows: int, read: Callable[[nn.Module], Course]) -> Course:
        """The whole model's course: the shortest one's, and what each further block adds."""
        # Peaks alone: where a GPU's command buffers end shifts from one class of operations to the other with depth.
        try:
            base, *longer = (read(model).coarse() for model in self._models)
        except InvalidArgumentError:
            raise
        except (ValueError, TypeError) as error:  # shapes and types that the architecture's own code does not expect
            raise InvalidArgumentError(
                f"mlx-lm's {type(self._models[0]).__module__} does not generate in a batch of {rows}: {error}"
            ) from error
        if not longer:
            return base
        times = [more / step for more, step in zip(self._missing, self._steps, strict=True)]
        return Course(
            {
                key: round(n + sum(t * (course.highest[key] - n) for t, course in zip(times, longer, strict=True)))
                for key, n in base.highest.items()
            }
        )

    def _filled(self, model: nn.Module, rows: int, tokens: int, more: int = 0, *, exact: bool) -> list[object]:
        return filled_caches(model, rows, tokens, more, exact=exact, kv_bits=self._kv_bits)

    def _course(self, model: nn.Module, rows: int, held: int, tokens: int, *, logits: bool) -> Course:
        """A model reading some tokens on top of those that its caches hold."""
        import mlx.core as mx

        from mlx_tune.graphs.arguments import ArraySpec

        template = self._filled(model, rows, held, exact=logits)
        state: dict[str, object] = {"model": model, "cache": cache_arrays(template)}
        fresh = not state["cache"]

        def step(prompt: mx.array) -> object:
            arrays: list[mx.array] = state["cache"]  # type: ignore[assignment]
            caches = with_arrays(template, arrays)
            made = model(prompt, cache=caches)
            after = cache_arrays(caches)
            if not fresh:
                state["cache"] = after
            if not logits:
                return after if fresh else mx.zeros(1)
            last = made[:, -1, :]
            scores = last - mx.logsumexp(last, axis=-1, keepdims=True)
            return mx.argmax(scores, axis=-1), scores, after if fresh else []

        return course_of(step, (ArraySpec((rows, tokens), mx.int32),), state, self._backend)


def generation_fit(
    unloaded: Unloaded,
    backend: Backend,
    budget_bytes: int,
    *,
    context: int,
    batch_size: int,
    kv_bits: int | None,
    longest: int,
) -> GenerationFit:
    """Predict if generating fits, and how far it goes.

    Args:
        unloaded: The model's configuration.
        backend: The backend that it is priced for.
        budget_bytes: The limit of peaks.
        context: Tokens of prompt and answer together.
        batch_size: Rows at a time.
        kv_bits: Bits of keys and values.
        longest: The most tokens that the model allows.

    Raises:
        InvalidArgumentError: mlx-lm's code of the architecture does not take such a batch, or cache.
    """
    run = RunModel(unloaded, backend, kv_bits)
    room = int(budget_bytes / (1 + ESTIMATE_MARGIN))
    reading, writing = run.reading(batch_size, context).peak_bytes, run.writing(batch_size, context).peak_bytes
    most = min(longest, _MOST_TOKENS)
    far = Largest(0, 0)
    for first in ((PREFILL, 2 * PREFILL, 4 * PREFILL), (PREFILL // 8, PREFILL // 4, PREFILL // 2)):
        # Prompts up to one part are read at once, longer ones a part at a time.
        if far.size < PREFILL <= most or (far.size == 0 and most < PREFILL):
            far = largest_foretold(lambda tokens: run.floor(1, tokens), room, first, step=256, most=max(256, most))
    try:
        wide = largest_foretold(
            lambda rows: run.floor(rows, context), room, (PREFILL_ROWS, 2 * PREFILL_ROWS), most=_MOST_ROWS
        )
        if wide.size < PREFILL_ROWS:  # below, the rows that are read at a time grow as well
            wide = largest_foretold(lambda rows: run.floor(rows, context), room, (1, PREFILL_ROWS), most=PREFILL_ROWS)
    except InvalidArgumentError:  # a row at a time is all that mlx-lm's code of the architecture takes
        wide = largest_foretold(lambda rows: run.floor(rows, context), room, (1,), most=1)
    peak = ceil(max(reading, writing) * (1 + ESTIMATE_MARGIN))
    return GenerationFit(
        context=context,
        batch_size=batch_size,
        kv_bits=kv_bits,
        weights_bytes=run.weights_bytes,
        cache_bytes=run.cache_bytes(batch_size, context),
        reading_bytes=reading,
        writing_bytes=writing,
        peak_bytes=peak,
        fits=peak <= budget_bytes,
        longest_context=far.size,
        largest_batch=wide.size,
        context_limited=far.limited,
        batch_limited=wide.limited,
    )
