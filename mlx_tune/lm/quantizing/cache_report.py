"""`lm.cache_report`: fewer bits for the key/value cache, and what that costs in accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.memory import resolve_budget
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.progress import progress_bar
from mlx_tune.quantization.judging.accuracy import LanguageAccuracy
from mlx_tune.quantization.judging.evaluation import prepare_evaluation
from mlx_tune.quantization.judging.statistics import Estimate
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.models.stored_outputs import OutputStore
from mlx_tune.quantization.planning.shape_check import FAULTS, resolve
from mlx_tune.state import same_random_stream
from mlx_tune.trees import nbytes_of
from mlx_tune.units import Budget, format_bytes, format_percent

#: Bits and groups that mlx-lm's quantized cache works with: it reserves room by whole codes in a word.
_BITS, _GROUPS = (2, 4, 8), (32, 64, 128)


@dataclass(frozen=True)
class CacheCost:
    """A cache in some number of bits.

    Attributes:
        key_bits: Bits of keys; None as the model makes them.
        value_bits: The same of values.
        bytes_per_token: Bytes that one more token of a sequence takes in these caches, scales included.
        longest_context: Tokens of one sequence that the budget holds beside the model's weights; predicted.
        accuracy: The cost; None of the cache as it is, which is the reference.
    """

    key_bits: int | None
    value_bits: int | None
    bytes_per_token: int
    longest_context: int
    accuracy: LanguageAccuracy | None

    def __str__(self) -> str:
        """The bits in words."""
        if self.key_bits == self.value_bits:
            return "as it is" if self.key_bits is None else f"{self.key_bits} bits"
        return f"keys {self.key_bits} bits" if self.value_bits is None else f"values {self.value_bits} bits"

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "bytes_per_token": self.bytes_per_token,
            "longest_context": self.longest_context,
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
        }


@dataclass(frozen=True)
class CacheReport(Tabular):
    """The bytes and the cost of a quantized key/value cache; `print` it.

    Attributes:
        costs: The cache as it is, then each number of bits for both, for keys alone and for values alone.
        group_size: Numbers of a key or value that share a scale.
        budget_bytes: The memory that the model's weights and the cache are to fit in.
        weights_bytes: The weights.
        notes: Further remarks.
    """

    costs: tuple[CacheCost, ...]
    group_size: int
    budget_bytes: int
    weights_bytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {
            "costs": [cost.to_dict() for cost in self.costs],
            "group_size": self.group_size,
            "budget_bytes": self.budget_bytes,
            "weights_bytes": self.weights_bytes,
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """The table."""
        return Table(
            ("cache", "a token", "longest context", "mean KL", "same top token", "perplexity ratio"),
            [
                (str(cost), format_bytes(cost.bytes_per_token), f"{cost.longest_context:,}", *_figures(cost.accuracy))
                for cost in self.costs
            ],
            title=f"Key/value cache in groups of {self.group_size}; contexts predicted for {self._room()}",
            notes=[*(f"{c}: {c.accuracy.verdict}." for c in self.costs if c.accuracy is not None), *self.notes],
        )

    def _room(self) -> str:
        return f"{format_bytes(self.budget_bytes)} with {format_bytes(self.weights_bytes)} of weights"


def _figures(accuracy: LanguageAccuracy | None) -> tuple[str, str, str]:
    if accuracy is None:
        return "", "", ""
    return (
        str(Estimate(accuracy.mean_kl, accuracy.mean_kl_error)),
        f"{Estimate(100 * accuracy.same_top, 100 * accuracy.same_top_error)} %",
        str(Estimate(accuracy.perplexity_ratio, accuracy.perplexity_ratio_error)),
    )


def cache_report(
    model: nn.Module,
    evaluation: Iterable[object],
    *,
    kv_bits: Sequence[int] = (8, 4),
    group_size: int = 64,
    budget: Budget = None,
    progress: bool = True,
) -> CacheReport:
    """Measure what fewer bits for keys and values cost, and say what they save.

    Keys and values are quantized as `mlx_lm.generate --kv-bits` does with `--quantized-kv-start 0`: every one of them,
    by `mx.quantize` in the model's dtype, before attention sees it. The model computes in float32 otherwise, as in the
    report of `mlx_tune.quantize_model`, and is compared with itself without that, so that the figures are the cache's
    alone.

    Args:
        model: A model of mlx-lm, its weights packed or not.
        evaluation: Token arrays `[batch, length]`, which are shifted here. The cost grows with the length, up to that
            of the contexts that you mean to use.
        kv_bits: The bits to try: 8, 4 or 2.
        group_size: Numbers of a key or value that share a scale: 32, 64 or 128; it divides the model's head width.
        budget: The memory for weights and cache together, as in `mlx_tune.autobatch`.
        progress: Show progress lines.

    Returns:
        Bytes a token, the longest context, and the cost, of keys and values together and apart.

    Raises:
        InvalidArgumentError: Bits or groups that mlx-lm's cache cannot have, or a model without caches of that kind.
        QuantizationError: The batches are not token arrays that the model takes.
        DiskError: Too little free disk for what the model gives without quantization.

    Examples:
        ```python
        report = lm.cache_report(model, held_out, kv_bits=(8, 4), group_size=64)
        print(report)
        ```
    """
    for bits in kv_bits:
        if bits not in _BITS:
            raise InvalidArgumentError(f"kv_bits={tuple(kv_bits)}: mlx-lm's quantized cache has 2, 4 and 8 bits.")
    if group_size not in _GROUPS:
        raise InvalidArgumentError(f"group_size={group_size!r}: mx.quantize has groups of 32, 64 and 128.")
    from mlx_tune.lm.quantizing.rounded_cache import Rounding, RoundingCaches

    room, weights = resolve_budget(budget), nbytes_of(model.parameters())
    caches, notes = _seen_caches(model, group_size)

    def cost(key_bits: int | None, value_bits: int | None, accuracy: LanguageAccuracy | None) -> CacheCost:
        size = sum(_bytes(k, key_bits, group_size) + _bytes(v, value_bits, group_size) for k, v in caches)
        return CacheCost(key_bits, value_bits, size, max(0, int(room) - weights) // size, accuracy)

    costs, dtype = [cost(None, None, None)], caches[0][0].dtype
    pairs: list[tuple[int | None, int | None]] = []
    for bits in kv_bits:
        pairs += [(bits, bits), (bits, None), (None, bits)]
    walked = WalkedModel(model)
    with same_random_stream(), OutputStore() as store:
        comparison = prepare_evaluation(walked, resolve(walked, read_batches(evaluation, "evaluation"), "evaluation"))
        if comparison.kind != "tokens":
            raise InvalidArgumentError("evaluation must be token arrays [batch, length], as the model predicts them.")
        comparison.record(walked, store, progress=progress)
        with progress_bar("quantizing the cache", len(pairs), enabled=progress) as bar:
            for pair in pairs:
                rounding = RoundingCaches(model, Rounding(*pair, group_size, dtype))
                accuracy = comparison.judge(WalkedModel(rounding), store)
                assert isinstance(accuracy, LanguageAccuracy)
                costs.append(cost(*pair, accuracy))
                bar.advance()
    if comparison.noise_floor is not None:
        notes.append(f"Half precision alone moves the model by a mean KL of {comparison.noise_floor:.3g}.")
    reference = costs[1].accuracy if len(costs) > 1 else None
    if reference is not None:
        notes.append(
            f"On {reference.tokens:,} tokens of {reference.sequences} sequences; perplexity of the cache as it is "
            f"{Estimate(reference.perplexity_before, reference.perplexity_before_error)}."
        )
        if reference.non_finite:
            notes.append(f"Not finite, left out: {format_percent(reference.non_finite, 2)}.")
    return CacheReport(tuple(costs), group_size, int(room), weights, tuple(notes))


@dataclass(frozen=True)
class _Kind:
    """The keys or values of one token in a cache: heads, width of a head, dtype."""

    heads: int
    width: int
    dtype: mx.Dtype


def _bytes(kind: _Kind, bits: int | None, group_size: int) -> int:
    """Bytes of one token, with a scale and a bias for each group."""
    if bits is None:
        return kind.heads * kind.width * kind.dtype.size
    return kind.heads * (kind.width * bits // 8 + kind.width // group_size * 2 * kind.dtype.size)


def _seen_caches(model: nn.Module, group_size: int) -> tuple[list[tuple[_Kind, _Kind]], list[str]]:
    """The keys and values of those caches that mlx-lm quantizes, and remarks on others; nothing is evaluated."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    caches: list[Any] = make_prompt_cache(model)
    with WalkedModel(model).evaluation_mode():
        model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    plain = [cache for cache in caches if type(cache) is KVCache]
    others = Counter(type(cache).__name__ for cache in caches if type(cache) is not KVCache)
    if not plain:
        named = ", ".join(others)
        raise InvalidArgumentError(f"The model's caches are {named}: --kv-bits quantizes KVCache alone.")
    kinds = [tuple(_Kind(x.shape[1], x.shape[-1], x.dtype) for x in (c.keys, c.values)) for c in plain]
    odd = {kind.width for pair in kinds for kind in pair if kind.width % group_size}
    if odd:
        fitting = [size for size in _GROUPS if all(width % size == 0 for width in odd)]
        way_out = f"group_size={fitting[-1]} would do" if fitting else "no group size divides it"
        raise InvalidArgumentError(f"Heads {min(odd)} wide do not divide into groups of {group_size}: {way_out}.")
    packed = [c.to_quantized(group_size, 8) if type(c) is KVCache else c for c in make_prompt_cache(model)]
    try:
        with WalkedModel(model).evaluation_mode():
            model(mx.zeros((1, 1), dtype=mx.int32), cache=packed)
    except FAULTS as error:
        raise InvalidArgumentError(
            f"mlx-lm's {type(model).__module__.rpartition('.')[2]} cannot use a quantized cache: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    text = ", ".join(f"{count} of kind {name}" for name, count in others.items())
    notes = [f"{text} stay as they are and are not counted: --kv-bits quantizes KVCache alone."] if others else []
    return [(keys, values) for keys, values in kinds], notes
