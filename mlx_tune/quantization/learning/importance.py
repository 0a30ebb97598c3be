"""The energy of every layer's inputs, which says what an error in each column of its weights costs.

In trained language models a few channels of the residual stream carry most of the energy. Rounding that takes all
inputs for equal spends its levels on the others. No text is needed to find them: they stand out on random tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.formats.lazy_arrays import read_array
from mlx_tune.quantization.learning.input_samples import InputSamples
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.layers import EMBEDDINGS
from mlx_tune.quantization.models.reading import reading
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.substitution import ModuleCall, intercepted
from mlx_tune.units import format_names, number

#: Random tokens that a model without calibration is run on: rows and their length.
RANDOM_ROWS, RANDOM_LENGTH = 4, 64

#: What is added to every energy found on random tokens, as a share of the mean: real text also excites units that these
#: leave at rest.
_AT_REST = 0.1

#: Calibration that is looked at: energies are means, and need few tokens.
_TOKENS = 4096


class _NoTokensError(Exception):
    """The model does not look tokens up."""


@dataclass
class _Seen:
    """The inputs of one layer so far."""

    total: Any = 0.0
    rows: int = 0


@dataclass
class _Probe:
    """One run of a model, block after block: nothing more than a block is evaluated at a time."""

    names: dict[int, str]
    vocabulary: int | None
    samples: InputSamples | None
    seen: dict[str, _Seen] = field(default_factory=dict)
    looked_up: bool = False

    def block(self, call: ModuleCall) -> object:
        with reading(call.module):
            output = call.run()
            mx.eval(output, [seen.total for seen in self.seen.values()])
        return output

    def layer(self, call: ModuleCall) -> object:
        x = call.inputs
        if call.looks_up:
            self.looked_up = True
        elif x is not None and id(call.module) in self.names and x.ndim:
            path, rows = self.names[id(call.module)], x.reshape(-1, x.shape[-1])
            seen = self.seen.setdefault(path, _Seen())
            # In float16 squares would overflow.
            seen.total = seen.total + mx.square(rows.astype(mx.float32)).sum(0)
            seen.rows += rows.shape[0]
            if self.samples is not None and call.module["weight"].ndim == 2:
                self.samples.add(path, rows)
        return call.run()

    def outside(self, call: ModuleCall) -> object:
        with reading(call.module):
            output = self.layer(call)
            wide = isinstance(output, mx.array) and output.shape[-1:] == (self.vocabulary,)
            # The model's answers are wanted by nobody.
            mx.eval([] if wide else output, [seen.total for seen in self.seen.values()])
        return output


def with_energies(
    model: WalkedModel,
    plan: QuantizationPlan,
    calibration: Sequence[Batch],
    samples: InputSamples | None = None,
    *,
    blocks: Sequence[tuple[str, nn.Module]] = (),
) -> tuple[QuantizationPlan, tuple[str, ...]]:
    """A plan whose layers know the energies of their inputs.

    Args:
        model: The model, which is as it was when this returns.
        plan: Its plan.
        calibration: The batches to run the model on; where it is empty, random tokens.
        samples: Where to keep rows of what layers are given, for layers to hold outputs against.
        blocks: The model's blocks, of which one at a time is evaluated.

    Returns:
        The plan, and remarks for the report: why there are no energies, or which layers have none.
    """
    affine = [layer for layer in plan.layers if layer.mode == "affine"]
    if not affine:
        return plan, ()
    every = [layer for layer in (*plan.layers, *plan.skipped) if not layer.fixed or layer.format is not None]
    vocabulary = next((s.module["weight"].shape[0] for s in model.sites if isinstance(s.module, EMBEDDINGS)), None)
    batches = few_of(calibration) if calibration else _random_tokens(vocabulary)
    try:
        found = _energies(model, every, batches, vocabulary, samples, blocks, tokens_only=not calibration)
    except _NoTokensError:
        return plan, (_ALIKE.format("it looks no tokens up, so that there is nothing to run it on"),)
    except Exception as error:  # any model may refuse what it was not made for
        if calibration:
            raise
        return plan, (_ALIKE.format(f"running it on random tokens failed ({type(error).__name__}: {error})"),)

    def informed(layer: LayerPlan) -> LayerPlan:
        return replace(layer, energy=found.get(layer.path), inputs=samples.reader(layer.path) if samples else None)

    layers, skipped = (tuple(map(informed, part)) for part in (plan.layers, plan.skipped))
    lookups = [layer.path for layer in affine if isinstance(layer.module, nn.Embedding)]
    missing = [layer.path for layer in affine if layer.path not in found and layer.path not in lookups]
    notes: tuple[str, ...] = ()
    if missing:
        notes = (f"Nothing reached {format_names(missing, most=3)}: all inputs count alike there.",)
    return replace(plan, layers=layers, skipped=skipped), notes


_ALIKE = (
    "What the model's layers are given is not known, so all inputs count alike: {}. Where a few of them are far larger "
    "than the rest, method='optimal' may then do worse than 'nearest': pass calibration=[batches]."
)


def _energies(
    model: WalkedModel,
    layers: Sequence[LayerPlan],
    batches: list[Batch],
    vocabulary: int | None,
    samples: InputSamples | None,
    blocks: Sequence[tuple[str, nn.Module]],
    *,
    tokens_only: bool,
) -> dict[str, mx.array]:
    """The mean square of each input `[columns]` by path, without layers that were given none or none that is finite."""
    if not batches:
        raise _NoTokensError
    modules = {layer.path: layer.module for layer in layers}
    probe = _Probe({id(module): path for path, module in modules.items()}, vocabulary, samples)
    below = tuple(f"{path}." for path, _ in blocks)
    bodies = {id(block) for _, block in blocks}
    inside = {id(s.module) for s in model.sites if id(s.module) in bodies or any(p.startswith(below) for p in s.paths)}
    lookups = [site.module for site in model.sites if isinstance(site.module, nn.Embedding)]
    outer = [m for m in (*modules.values(), *lookups) if id(m) not in inside]
    inner = [m for m in modules.values() if id(m) in inside]
    with model.running():
        for batch in batches:
            with (
                intercepted([block for _, block in blocks], probe.block),
                intercepted(inner, probe.layer),
                intercepted(outer, probe.outside),
            ):
                batch.inputs.call(model.model)
            mx.eval([seen.total for seen in probe.seen.values()])
    if tokens_only and not probe.looked_up:
        raise _NoTokensError
    found = {}
    for layer in layers:
        seen = probe.seen.get(layer.path)
        if seen is None or seen.rows == 0 or seen.total.shape != (layer.shape[-1],):
            continue
        energy = seen.total / seen.rows
        if tokens_only:
            energy = energy + _AT_REST * energy.mean()
        if mx.isfinite(energy).all().item() and number(energy.max()) > 0:
            if isinstance(layer.module, nn.Embedding):
                energy = _with_lookups(layer, energy)
            found[layer.path] = energy
    return found


def _with_lookups(layer: LayerPlan, energy: mx.array) -> mx.array:
    """The weights of a tied embedding's columns: the relative errors of its logits and of the rows looked up, added."""
    weight = read_array(layer.module["weight"])
    squares = mx.square(weight.astype(mx.float32)).mean(0)
    return energy / mx.maximum((squares * energy).sum(), 1e-30) + 1 / mx.maximum(squares.sum(), 1e-30)


def _random_tokens(vocabulary: int | None) -> list[Batch]:
    if vocabulary is None:
        return []
    tokens = mx.random.randint(0, vocabulary, (RANDOM_ROWS, RANDOM_LENGTH + 1), key=mx.random.key(0))
    return [Batch((tokens,), tokens)]


def few_of(batches: Sequence[Batch]) -> list[Batch]:
    """Batches of about so many tokens, spread over all of them."""
    sizes = [batch.tokens.size if batch.tokens is not None else _TOKENS // 8 for batch in batches]
    step = max(1, round(sum(sizes) / _TOKENS))
    return list(batches[::step])
