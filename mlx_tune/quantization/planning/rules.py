"""Which format a layer gets, and why: overrides, layers to skip, and what a model protects."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.modes import (
    ACTIVATION_MODES,
    AFFINE_GROUP_SIZES,
    DEFAULT_BITS,
    DEFAULT_GROUP_SIZE,
    FIXED_MODES,
    Format,
    check_format,
)
from mlx_tune.quantization.models.layers import why_not_quantizable
from mlx_tune.quantization.models.sites import Site

#: What routers get, as in mlx-lm's own predicates: at 8 bits the choice of experts practically never changes.
_ROUTER_FORMAT = Format(8, 64, "affine")


@dataclass(frozen=True)
class Decision:
    """The decision on a layer.

    Attributes:
        format: The format it gets, or None where it is left as it is.
        reason: Why it is left, or why it gets another format than the rest.
        by_hand: True where an override or `skip` decided, so that an allocation must not change it.
        protected: True where the model or its role as a router decided.
    """

    format: Format | None
    reason: str | None = None
    by_hand: bool = False
    protected: bool = False


@dataclass(frozen=True)
class Rules:
    """Everything that decides on formats, checked.

    Attributes:
        base: The format for all that nothing else is said of.
        overrides: Pattern to what it gets: True (the base format, protected or not), False, or a format's parts.
        skip: Patterns of layers to leave alone.
        predicate: The model's own `quant_predicate`, if it has one.
        routers: Ids of the modules that are routers.
    """

    base: Format
    overrides: Mapping[str, bool | Mapping[str, object]] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    predicate: Callable[[str, nn.Module], object] | None = None
    routers: frozenset[int] = frozenset()

    def decide(self, paths: Sequence[str], module: nn.Module, last_axis: int) -> Decision:
        """Settle one layer.

        Args:
            paths: Every place where it stands; a pattern means it by any of them.
            module: The module there; not yet quantized, or about to be quantized anew.
            last_axis: Length of the rows of its weights.

        Raises:
            QuantizationError: It was named by hand and cannot be had.
        """
        by_hand = self.left_by_hand(paths)
        if by_hand is not None:
            return by_hand
        pattern, wanted = self._wanted(paths)
        if wanted is not None:
            return self._override(paths[0], module, last_axis, pattern, wanted)
        return self._protect(paths[0], module, last_axis) or self._plain(module, last_axis)

    def left_by_hand(self, paths: Sequence[str]) -> Decision | None:
        """The decision of `skip`, or of an override that is False; None where neither says anything."""
        for pattern in self.skip:
            if any(matches(path, pattern) for path in paths):
                return Decision(None, f"skip={pattern!r}", by_hand=True)
        pattern, wanted = self._wanted(paths)
        return Decision(None, f"overrides[{pattern!r}] is False", by_hand=True) if wanted is False else None

    def _wanted(self, paths: Sequence[str]) -> tuple[str, bool | Mapping[str, object] | None]:
        """The override that counts, and its pattern."""
        found: tuple[str, bool | Mapping[str, object] | None] = "", None
        for pattern, value in self.overrides.items():
            if any(matches(path, pattern) for path in paths):
                found = pattern, value  # the later one wins
        return found

    def _override(
        self, path: str, module: nn.Module, last_axis: int, pattern: str, wanted: bool | Mapping[str, object]
    ) -> Decision:
        target = _merge(self.base, wanted, f"overrides[{pattern!r}]: ") if isinstance(wanted, Mapping) else self.base
        problem = _problem(module, last_axis, target)
        if problem is None:
            # True lifts a protection; it leaves the bits open to an allocation.
            return Decision(self._with_inputs(module, target), f"overrides[{pattern!r}]", by_hand=wanted is not True)
        if _is_exact(pattern):
            raise QuantizationError(f"overrides[{pattern!r}]: {path} cannot be quantized: {problem}.")
        return Decision(None, problem)

    def _protect(self, path: str, module: nn.Module, last_axis: int) -> Decision | None:
        answer: object = True if self.predicate is None else self.predicate(path, module)
        if answer is False or answer is None:
            return Decision(None, "protected by the model's quant_predicate", protected=True)
        if isinstance(answer, Mapping):
            parts = {k: v for k, v in answer.items() if k in ("bits", "group_size", "mode")}
            target, source = _merge(self.base, parts, f"the model's quant_predicate for {path}: "), "quant_predicate"
        elif id(module) in self.routers and not (self.base.mode == "affine" and self.base.bits >= _ROUTER_FORMAT.bits):
            target, source = _ROUTER_FORMAT, "router"
        else:
            return None
        if target == self.base:
            return None
        fitting = _fitting(module, last_axis, target)
        if fitting is None:
            return Decision(None, _problem(module, last_axis, target), protected=True)
        reason = "MoE router" if source == "router" else "set by the model's quant_predicate"
        return Decision(fitting, reason, protected=True)

    def _plain(self, module: nn.Module, last_axis: int) -> Decision:
        problem = _problem(module, last_axis, self.base)
        if problem is not None:
            return Decision(None, problem)
        chosen = self._with_inputs(module, self.base)
        lost = self.base.quantize_input and not chosen.quantize_input
        return Decision(chosen, _why_inputs_not(module) if lost else None)

    def _with_inputs(self, module: nn.Module, target: Format) -> Format:
        wanted = self.base.quantize_input and target.mode in ACTIVATION_MODES and _why_inputs_not(module) is None
        return Format(target.bits, target.group_size, target.mode, wanted)


def find_routers(sites: Iterable[Site]) -> set[int]:
    """Ids of the modules that choose a token's experts: a small error there sends it elsewhere.

    A router is a layer beside a stack of experts (weights with a first axis of E experts) with E outputs, or one
    that weighs the shared expert with a single output, and is named a gate or a router.
    """
    by_path = {path: site.module for site in sites for path in site.paths}
    found: set[int] = set()
    experts: dict[str, int] = {}
    for path, module in by_path.items():
        weight = module.get("weight")
        if isinstance(weight, mx.array) and weight.ndim == 3:
            # layers.3.mlp.switch_mlp.up_proj: the router is at layers.3.mlp.gate or layers.3.router.proj.
            home = path.rpartition(".")[0].rpartition(".")[0]
            experts[home] = weight.shape[0]
    for path, module in by_path.items():
        weight = module.get("weight")
        if not isinstance(weight, mx.array) or weight.ndim != 2:
            continue
        parent, _, name = path.rpartition(".")
        named = name if "gate" in name or "router" in name else parent.rpartition(".")[2]
        homes = {parent, parent.rpartition(".")[0]}
        count = next((experts[home] for home in homes if home in experts), None)
        if count is not None and ("gate" in named or "router" in named) and weight.shape[0] in (count, 1):
            found.add(id(module))
    return found


def matches(path: str, pattern: str) -> bool:
    """True where a pattern with `*`, `?` and `[...]` means this path; `"*.lm_head"` also means a top-level `lm_head`.

    Examples:
        >>> matches("lm_head", "*.lm_head"), matches("model.layers.0.mlp", "*.self_attn")
        (True, False)
    """
    return fnmatchcase(path, pattern) or fnmatchcase(f".{path}", pattern)


def check_patterns(
    overrides: object, skip: Iterable[str] | str | None, paths: Iterable[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Check `overrides` and `skip`: of the right types, and every pattern meaning at least one layer.

    Raises:
        QuantizationError: Otherwise; the text offers paths that come close.
    """
    chosen = {} if overrides is None else overrides
    if not isinstance(chosen, Mapping):
        raise QuantizationError(
            f"overrides={chosen!r} must map patterns to formats, such as {{'*.lm_head': dict(bits=8)}}."
        )
    for pattern, value in chosen.items():
        if not isinstance(value, (bool, Mapping)):
            raise QuantizationError(
                f"overrides[{pattern!r}]={value!r} must be a dict of bits, group_size and mode, False to leave the "
                "layer alone, or True to quantize it like the rest."
            )
        unknown = set(value) - {"bits", "group_size", "mode"} if isinstance(value, Mapping) else set()
        if unknown:
            raise QuantizationError(
                f"overrides[{pattern!r}] has {', '.join(sorted(map(repr, unknown)))}: "
                "only 'bits', 'group_size' and 'mode' can be set for a layer."
            )
    if skip is not None and not isinstance(skip, Iterable):
        raise QuantizationError(f"skip={skip!r} must be a pattern or a list of patterns, such as '*.lm_head'.")
    left = () if skip is None else (skip,) if isinstance(skip, str) else tuple(skip)
    known = list(paths)
    for argument, patterns in (("overrides", chosen), ("skip", left)):
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise QuantizationError(f"{argument}: {pattern!r} must be text, such as '*.lm_head'.")
            if not any(matches(path, pattern) for path in known):
                if any(matches(path, f"{pattern}.*") for path in known):
                    raise QuantizationError(
                        f"{argument}: {pattern!r} is no layer, but holds some: {pattern + '.*'!r} means all of them."
                    )
                close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
                raise QuantizationError(
                    f"{argument}: no layer matches {pattern!r}. Layers are named like {', '.join(close)}."
                )
    return dict(chosen), left


def _merge(base: Format, parts: Mapping[str, object], where: str) -> Format:
    """The base format with some parts replaced."""
    mode = parts.get("mode", base.mode)
    if "mode" not in parts and mode in FIXED_MODES and ("bits" in parts or "group_size" in parts):
        mode = "affine"  # asking for bits in a mode that fixes them means wanting another one
    same = mode == base.mode
    bits = parts.get("bits", base.bits if same else DEFAULT_BITS)
    group_size = parts.get("group_size", base.group_size if same else DEFAULT_GROUP_SIZE)
    return check_format(bits, group_size, mode, where=where)


def _problem(module: nn.Module, last_axis: int, target: Format) -> str | None:
    """Why this module cannot have this format, or None."""
    reason = why_not_quantizable(module, target.mode)
    if reason is not None:
        return reason
    if last_axis % target.group_size == 0:
        return None
    text = f"last axis {last_axis} not divisible by {target.group_size}"
    affine = target.mode == "affine"
    others = [size for size in AFFINE_GROUP_SIZES if affine and last_axis % size == 0]
    if others:
        return f"{text}; {max(others)} would do"
    if not affine:
        return f"{text}; mode {target.mode!r} has no other group size"
    others = [size for size, _ in FIXED_MODES.values() if last_axis % size == 0]
    hint = f"; mode 'nvfp4', in groups of {min(others)}, would do" if others else ""
    return f"{text}; no group size of mode 'affine' divides it{hint}"


def _fitting(module: nn.Module, last_axis: int, target: Format) -> Format | None:
    """The format itself, or with a smaller group where only that divides."""
    if _problem(module, last_axis, target) is None:
        return target
    if target.mode == "affine":
        for size in sorted(AFFINE_GROUP_SIZES, reverse=True):
            smaller = Format(target.bits, size, target.mode)
            if size < target.group_size and _problem(module, last_axis, smaller) is None:
                return smaller
    return None


def _why_inputs_not(module: nn.Module) -> str | None:
    if not isinstance(module, nn.Linear):
        return f"weights only: MLX quantizes the inputs of Linear, not of {type(module).__name__}"
    if "bias" in module:
        return "weights only: MLX cannot quantize the inputs of a Linear with a bias"
    return None


def _is_exact(pattern: str) -> bool:
    return not any(sign in pattern for sign in "*?[")
