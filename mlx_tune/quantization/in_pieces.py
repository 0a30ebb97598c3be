"""Quantizing a model whose weights lie on disk, a layer at a time, each packed layer handed on and forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.memory import cache_limit, held_cache, track_memory
from mlx_tune.progress import progress_bar
from mlx_tune.quantization.build_report import LayerOutcome, report_of
from mlx_tune.quantization.formats.lazy_arrays import read_array
from mlx_tune.quantization.formats.packing import PackedArrays, quantize_nearest
from mlx_tune.quantization.judging.report import QuantizationReport
from mlx_tune.quantization.learning.gptq_model import CalibratedLayer, gptq_model
from mlx_tune.quantization.learning.importance import few_of, with_energies
from mlx_tune.quantization.learning.input_samples import InputSamples
from mlx_tune.quantization.methods import Put, apply_layer, calibrated_outcome, install
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.layers import dense_twin, is_quantized, quantized_module
from mlx_tune.quantization.models.reading import reading, reading_in_turn
from mlx_tune.quantization.models.sites import Site, WalkedModel, in_places, own_arrays
from mlx_tune.quantization.planning.checks import check_backend, check_finite, check_overflow
from mlx_tune.quantization.planning.faulty_kernels import fault_finder, keep_unpacked
from mlx_tune.quantization.planning.layout import lay_out
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.quantization.planning.request import Request
from mlx_tune.quantization.planning.shape_check import rehearse
from mlx_tune.state import same_random_stream

#: MLX's cache of freed buffers meanwhile: layers differ in size, so that more would hardly be used again.
_CACHE_BYTES = 32 << 20

#: The energies of layers' inputs by path, and remarks on them.
Energies = tuple[Mapping[str, mx.array], tuple[str, ...]]


class Store(Protocol):
    """Where packed layers go, and what is remembered of those that an earlier call has made."""

    @property
    def outcomes(self) -> Mapping[str, LayerOutcome]:
        """The outcomes of layers that are in it, by path."""
        ...

    @property
    def energies(self) -> Energies | None:
        """The energies that `remember` was given; None before."""
        ...

    def remember(self, energies: Energies) -> None:
        """Keep what checking and running the model took."""
        ...

    def write(self, name: str, array: mx.array) -> None:
        """Keep an array of the model under its name."""
        ...

    def read(self, name: str) -> mx.array:
        """An array that was written, unevaluated."""
        ...

    def finish(self, outcome: LayerOutcome) -> None:
        """A layer whose arrays have all been written is done."""
        ...


def plan_in_pieces(
    model: WalkedModel, request: Request, *, verify_kernels: bool = True, progress: bool = False
) -> QuantizationPlan:
    """The plan for a model, without a weight read.

    Args:
        model: The model.
        request: The formats and the method that are asked for.
        verify_kernels: As for `quantize_model`.
        progress: Show progress lines.

    Raises:
        QuantizationError: It cannot be had.
        BackendError: As for `quantize_model`.
    """
    plan = lay_out(model, request)
    check_backend(plan)
    return keep_unpacked(plan, fault_finder(model), progress=progress) if verify_kernels else plan


@contextmanager
def as_planned(plan: QuantizationPlan) -> Iterator[None]:
    """Have packed layers stand in the model while the block runs, their arrays of the shapes that they will have.

    Args:
        plan: A plan of the model. No array in it may be evaluated inside the block.
    """
    with in_places(
        [(site, quantized_module(site.module, x.wanted, _hollow(x))) for x in plan.layers for site in x.sites]
    ):
        yield


def _hollow(layer: LayerPlan) -> PackedArrays:
    """Packed arrays of a layer that are never evaluated."""
    dtype = getattr(mx, layer.wanted.scale_dtype or layer.dtype)
    return quantize_nearest(mx.zeros(layer.shape, dtype), **layer.wanted.keywords())


def quantize_in_pieces(
    model: WalkedModel,
    plan: QuantizationPlan,
    store: Store,
    *,
    calibration: Sequence[Batch] = (),
    progress: bool = False,
) -> QuantizationReport:
    """Carry a plan out by "nearest", "optimal" or "gptq", and write every array of the quantized model to a store.

    The model itself stays as it is: its weights are read where they are needed, and not kept. At most one layer is in
    memory, or a block while the model is run. Arrays and report are those of `quantize_model`.

    Args:
        model: A model whose weights lie on disk, loaded lazily.
        plan: From `plan_in_pieces`.
        store: Where the arrays go. Layers that it has outcomes of are not done again.
        calibration: The batches that "gptq" learns from, and "optimal" the energies of inputs.
        progress: Show progress lines.

    Raises:
        QuantizationError: Weights stand in the way: NaN, infinite, or such as would overflow.
    """
    before = len(store.outcomes)
    with (
        same_random_stream(),
        held_cache(min(cache_limit(), _CACHE_BYTES)),
        track_memory() as memory,
        InputSamples(len(few_of(calibration))) as samples,
    ):
        learn, _ = rehearse(model, plan, list(calibration), [], None)
        plan, notes = _informed(model, plan, store, learn, samples)
        calibrated = [x for x in plan.layers if plan.method == "gptq" and x.mode == "affine"]
        others = [x for x in plan.layers if x not in calibrated]
        with _replaceable(plan, store) as places:
            with progress_bar("quantizing", len(others), enabled=progress and bool(others)) as bar:
                for layer in others:
                    bar.update(text=layer.path)
                    if layer.path not in store.outcomes:
                        put = places.put if calibrated else _writer(store)
                        method = "nearest" if plan.method == "nearest" else "optimal"
                        store.finish(apply_layer(layer, method, plan.effort, put))
                    if calibrated:
                        places.forget(layer)
                    bar.advance()
            if calibrated:
                _calibrate(model, calibrated, plan, learn, places, progress)
        packed = {path for layer in plan.layers for path in layer.paths}
        arrays: dict[str, mx.array] = dict(tree_flatten(model.model.parameters()))
        for name, array in arrays.items():
            if name.rpartition(".")[0] not in packed:
                store.write(name, read_array(array))
    if before:
        notes += (f"{before} of {len(plan.layers)} layers were there from an earlier call that had not ended.",)
    return report_of(plan, store.outcomes, memory, None, None, notes)


class _Places:
    """The layers of a model while packed ones take their places, whose arrays lie in a store."""

    def __init__(self, plan: QuantizationPlan, store: Store) -> None:
        self.store = store
        self.before = [(site, site.module) for layer in plan.layers for site in layer.sites]
        self._write = _writer(store)

    def put(self, site: Site, module: nn.Module) -> None:
        """Write a packed module's arrays, and have it stand in the model."""
        self._write(site, module)
        site.put(module)

    def install(self, layer: LayerPlan, arrays: PackedArrays) -> None:
        """The same for a layer, unless its arrays are written already."""
        install(layer, arrays, Site.put if layer.path in self.store.outcomes else self.put)

    def known(self, layer: LayerPlan) -> tuple[CalibratedLayer, tuple[mx.array, mx.array, mx.array]] | None:
        """A layer that an earlier call has written."""
        found = self.store.outcomes.get(layer.path)
        if found is None:
            return None
        packed, scales, biases = (self.store.read(f"{layer.path}.{x}") for x in ("weight", "scales", "biases"))
        outcome = CalibratedLayer(layer.path, found.method, found.output_error, found.optimal_output_error, found.note)
        return outcome, (read_array(packed), read_array(scales), read_array(biases))

    def left(self, done: Sequence[tuple[LayerPlan, CalibratedLayer]]) -> None:
        """Note that layers are done, and forget their arrays."""
        for layer, found in done:
            if layer.path not in self.store.outcomes:
                before = next(module for site, module in self.before if site is layer.sites[0])
                self.store.finish(calibrated_outcome(layer, before, found))
            self.forget(layer)

    def forget(self, layer: LayerPlan) -> None:
        """Let a packed layer be read from the store where it is called."""
        for site in layer.sites:
            if not is_quantized(site.module):  # an earlier call has made it
                arrays: Any = tuple(self.store.read(f"{layer.path}.{x}") for x in PARTS[layer.mode == "affine"])
                site.put(quantized_module(site.module, layer.wanted, (*arrays, None)[:3]))
            for name in own_arrays(site.module):
                dict.__setitem__(site.module, name, self.store.read(f"{site.path}.{name}"))


#: The arrays of a packed layer, without and with biases.
PARTS = (("weight", "scales"), ("weight", "scales", "biases"))


@contextmanager
def _replaceable(plan: QuantizationPlan, store: Store) -> Iterator[_Places]:
    """Let layers be replaced while the block runs."""
    places = _Places(plan, store)
    try:
        yield places
    finally:
        for site, module in places.before:
            site.put(module)


def _calibrate(
    model: WalkedModel,
    layers: list[LayerPlan],
    plan: QuantizationPlan,
    learn: list[Batch],
    places: _Places,
    progress: bool,
) -> None:
    """GPTQ, block by block, what layers are given on disk."""
    for site in (site for layer in layers for site in layer.sites):
        if is_quantized(site.module):
            site.put(dense_twin(site.module))
    blocks = blocks_of(model.model)

    def read(module: nn.Module | None) -> AbstractContextManager[None]:
        return reading_in_turn(model, [block for _, block in blocks]) if module is None else reading(module)

    gptq_model(
        model,
        layers,
        learn,
        install=places.install,
        blocks=blocks,
        effort=plan.effort,
        progress=progress,
        room_bytes=0,
        read=read,
        known=places.known,
        left=places.left,
    )


def _writer(store: Store) -> Put:
    def put(site: Site, module: nn.Module) -> None:
        for name, array in own_arrays(module).items():
            read = read_array(array)
            for path in site.paths:
                store.write(f"{path}.{name}", read)

    return put


def _informed(
    model: WalkedModel, plan: QuantizationPlan, store: Store, learn: list[Batch], samples: InputSamples
) -> tuple[QuantizationPlan, tuple[str, ...]]:
    """The plan with the energies of inputs where its method counts them, and its weights found fit to be packed."""
    known = store.energies
    if plan.method == "optimal" and learn:
        largest = check_finite(plan) if known is None else None
        plan, notes = with_energies(model, plan, learn, samples, blocks=blocks_of(model.model))
        if largest is not None:
            check_overflow(plan, largest)
            store.remember(({x.path: x.energy for x in plan.layers if x.energy is not None}, notes))
        return plan, notes
    if known is None:
        largest = check_finite(plan)
        informed, notes = plan, tuple[str, ...]()
        if plan.method == "optimal":
            informed, notes = with_energies(model, plan, [], blocks=blocks_of(model.model))
        check_overflow(informed, largest)
        known = {x.path: x.energy for x in informed.layers if x.energy is not None}, notes
        store.remember(known)
    energies, notes = known
    return replace(plan, layers=tuple(replace(x, energy=energies.get(x.path)) for x in plan.layers)), notes
