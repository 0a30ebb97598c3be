"""Laying a plan out: every layer's format and bytes. Every mistake that needs no weights is found here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.modes import ACTIVATION_MODES, ITEM_BYTES, Format, check_format
from mlx_tune.quantization.models.layers import current_format, dense_twin, is_quantized, parameter_count
from mlx_tune.quantization.models.sites import Site, WalkedModel, own_arrays
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan, notes_of
from mlx_tune.quantization.planning.request import Request
from mlx_tune.quantization.planning.rules import Decision, Rules, check_patterns, find_routers
from mlx_tune.units import dtype_name

METHODS = ("nearest", "optimal", "gptq", "dwq")
EFFORTS = ("fast", "best")


def lay_out(model: WalkedModel, request: Request) -> QuantizationPlan:
    """The plan for a request.

    Raises:
        QuantizationError: Something in it cannot be had.
    """
    base, scales = _check(request), _scale_dtype(request.scale_dtype)
    candidates = [s for s in model.sites if is_quantized(s.module) or _has_matrix(s.module)]
    paths = [path for site in candidates for path in site.paths]
    chosen, left = check_patterns(request.overrides, request.skip, paths)
    predicate = getattr(model.model, "quant_predicate", None)
    rules = Rules(base, chosen, left, predicate, frozenset(find_routers(model.sites)))
    drafts = [_with_scales(_draft(site, rules, request.requantize), scales) for site in candidates]
    _refuse_quantized(drafts, request.requantize)

    ledger = _Ledger()
    layers: list[LayerPlan] = []
    skipped: list[LayerPlan] = []
    for order, (group, ties) in enumerate(_tied(drafts)):
        layer = replace(_layer(base, group, ledger, ties), order=order)
        (skipped if layer.format is None else layers).append(layer)
    if not layers:
        raise QuantizationError(_nothing_left(skipped))
    # Everything else: loose parameters, norms, and biases of unquantized modules without a matrix.
    size, parameters = totals(site.module for site in model.sites)
    rest = size - sum(x.bytes_before for x in (*layers, *skipped))
    return QuantizationPlan(
        layers=tuple(layers),
        skipped=tuple(skipped),
        rest_bytes=rest,
        parameters=parameters,
        method=request.method,
        effort=request.effort,
        size_before_bytes=size,
        notes=notes_of(layers, skipped),
        scale_dtype=scales,
    )


def _check(request: Request) -> Format:
    """Check what can be checked without looking at the model's layers, and make the base format of it."""
    method, mode, effort = request.method, request.mode, request.effort
    if method not in METHODS:
        raise QuantizationError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}.")
    if effort not in EFFORTS:
        raise QuantizationError(f"effort={effort!r} is unknown: choose 'fast' or 'best'.")
    base = check_format(request.bits, request.group_size, mode)
    if mode != "affine" and method in ("gptq", "dwq"):
        raise QuantizationError(
            f"method={method!r} works on scales and biases of mode 'affine'; mode={mode!r} has neither. "
            "Use method='optimal' or 'nearest' with it."
        )
    if request.activations and mode not in ACTIVATION_MODES:
        raise QuantizationError(
            f"activations=True does not work in mode {mode!r}: MLX quantizes inputs in nvfp4 and mxfp8 only."
        )
    return replace(base, quantize_input=request.activations)


def totals(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """All bytes of some modules' own arrays, and how many unquantized parameters they stand for; tied arrays once."""
    seen: set[int] = set()
    size = parameters = 0
    for module in modules:
        arrays = {n: a for n, a in own_arrays(module).items() if id(a) not in seen}
        seen.update(id(a) for a in arrays.values())
        size += sum(a.nbytes for a in arrays.values())
        parameters += parameter_count(module, arrays)
    return size, parameters


@dataclass(frozen=True)
class _Draft:
    site: Site
    twin: nn.Module
    decision: Decision


def _draft(site: Site, rules: Rules, requantize: bool) -> _Draft:
    module = site.module
    if is_quantized(module) and not requantize:
        # Left alone where the user says so; otherwise an error that is raised once all of them are known.
        by_hand = rules.left_by_hand(site.paths)
        return _Draft(site, module, by_hand or Decision(None, "quantized already"))
    if not site.path:
        reason = "it is the model itself, which cannot be replaced in place: wrap it in nn.Sequential"
        return _Draft(site, module, Decision(None, reason))
    twin = dense_twin(module)
    weight = twin.get("weight")
    last_axis = weight.shape[-1] if isinstance(weight, mx.array) and weight.ndim else 0
    return _Draft(site, twin, rules.decide(site.paths, twin, last_axis))


def _scale_dtype(given: mx.Dtype | str | None) -> str | None:
    name = dtype_name(given) if isinstance(given, mx.Dtype) else given
    if name is not None and name not in ITEM_BYTES:
        raise QuantizationError(
            f"scale_dtype={given!r}: scales are {', '.join(ITEM_BYTES)}, or None as the weights are."
        )
    return name


def _with_scales(draft: _Draft, scales: str | None) -> _Draft:
    """The draft with its scales in the dtype that was asked for, where that is not the weights' own."""
    chosen, weight = draft.decision.format, draft.twin.get("weight")
    if scales is None or chosen is None or chosen.mode != "affine" or not isinstance(weight, mx.array):
        return draft
    if weight.dtype == getattr(mx, scales):
        return draft
    return replace(draft, decision=replace(draft.decision, format=replace(chosen, scale_dtype=scales)))


def _refuse_quantized(drafts: list[_Draft], requantize: bool) -> None:
    if requantize:
        return
    already = [d.site for d in drafts if is_quantized(d.site.module) and not d.decision.by_hand]
    if already:
        first = already[0]
        raise QuantizationError(
            f"{len(already)} of {len(drafts)} layers are quantized already, the first being "
            f"{first.path or 'the model'} ({current_format(first.module)}). Quantize the unquantized model, pass "
            "requantize=True to quantize these weights once more (errors add up), or leave them alone with skip=."
        )


def _tied(drafts: list[_Draft]) -> Iterator[tuple[list[_Draft], list[list[_Draft]]]]:
    """Drafts that share one weight array and one fate, together and in order; and all groups that share that array."""
    groups: dict[tuple[int, Format | None], list[_Draft]] = {}
    sharing: dict[int, list[list[_Draft]]] = {}
    for draft in drafts:
        weight = draft.site.module.get("weight")
        key = id(weight) if isinstance(weight, mx.array) else id(draft.site.module)
        group = groups.setdefault((key, draft.decision.format), [])
        if not group:
            sharing.setdefault(key, []).append(group)
        group.append(draft)
    for (key, _), group in groups.items():
        yield group, sharing[key]


def _layer(base: Format, group: list[_Draft], ledger: _Ledger, ties: list[list[_Draft]]) -> LayerPlan:
    first = group[0]
    weight = first.twin.get("weight")
    shape = tuple(weight.shape) if isinstance(weight, mx.array) else ()
    if not shape:
        shape = max((tuple(a.shape) for a in own_arrays(first.twin).values()), key=len)
    dtype = dtype_name(weight.dtype if isinstance(weight, mx.array) else mx.float32)
    chosen, decision = first.decision.format, first.decision
    own = [item for draft in group for item in own_arrays(draft.site.module).items()]
    before = ledger.before(array for _, array in own)
    reasons = [decision.reason] if decision.reason else []
    if len(ties) > 1:
        others = [draft.site.path for other in ties if other is not group for draft in other]
        reasons.append(f"stored apart from {', '.join(others)}, whose weights it shares now")
    plan = LayerPlan(
        path=first.site.path,
        paths=tuple(path for draft in group for path in draft.site.paths),
        kind=type(first.site.module).__name__,
        shape=shape,
        dtype=dtype,
        format=chosen,
        bytes_before=before,
        bytes_after=0,
        reason="; ".join(reasons) or None,
        fixed=decision.by_hand or decision.protected,
        sites=tuple(draft.site for draft in group),
    )
    item = ITEM_BYTES.get(dtype)
    if chosen is not None and item is not None:
        kept = ledger.after(array for name, array in own if name not in _PACKED)
        return replace(plan, bytes_after=kept + chosen.nbytes(plan.weights, item))
    after = ledger.after(array for _, array in own)
    cost = 0
    if item is not None and not is_quantized(first.site.module) and _would_pack(first.twin):
        cost = after - sum(a.nbytes for name, a in own if name not in _PACKED) - base.nbytes(plan.weights, item)
    return replace(plan, bytes_after=after, cost_bytes=max(0, cost))


#: Arrays of a module that its packed ones take the place of.
_PACKED = ("weight", "scales", "biases", "global_scale")


class _Ledger:
    """Which arrays have been counted, before and after, so that a shared one counts once in each."""

    def __init__(self) -> None:
        self._seen: tuple[set[int], set[int]] = set(), set()

    def before(self, arrays: Iterable[mx.array]) -> int:
        return self._count(arrays, self._seen[0])

    def after(self, arrays: Iterable[mx.array]) -> int:
        return self._count(arrays, self._seen[1])

    @staticmethod
    def _count(arrays: Iterable[mx.array], seen: set[int]) -> int:
        new = {id(array): array.nbytes for array in arrays if id(array) not in seen}
        seen.update(new)
        return sum(new.values())


def _would_pack(module: nn.Module) -> bool:
    return callable(getattr(module, "to_quantized", None))


def _has_matrix(module: nn.Module) -> bool:
    return any(a.ndim >= 2 for a in own_arrays(module).values()) or (
        "weight" in module and callable(getattr(module, "to_quantized", None))
    )


def _nothing_left(skipped: list[LayerPlan]) -> str:
    if not skipped:
        return "There is nothing to quantize: the model has no layer with a matrix of weights."
    lines = [f"  {layer.path or 'the model itself'} ({layer.kind}): {layer.reason}" for layer in skipped[:8]]
    if len(skipped) > 8:
        lines.append(f"  and {len(skipped) - 8} more")
    return "There is nothing left to quantize. Every layer was left out:\n" + "\n".join(lines)
