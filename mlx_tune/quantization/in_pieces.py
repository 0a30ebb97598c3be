"""Quantizing a model whose weights lie on disk, a layer at a time, each packed layer handed on and forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

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
from mlx_tune.quantization.learning.importance import with_energies
from mlx_tune.quantization.methods import Put, apply_layer
from mlx_tune.quantization.models.layers import quantized_module
from mlx_tune.quantization.models.sites import Site, WalkedModel, in_places, own_arrays
from mlx_tune.quantization.planning.checks import check_backend, check_finite, check_overflow
from mlx_tune.quantization.planning.faulty_kernels import fault_finder, keep_unpacked
from mlx_tune.quantization.planning.layout import lay_out
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.quantization.planning.request import Request
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
    model: WalkedModel, plan: QuantizationPlan, store: Store, *, progress: bool = False
) -> QuantizationReport:
    """Carry a plan out by "nearest" or "optimal", and write every array of the quantized model to a store.

    The model itself stays as it is: its weights are read where they are needed, and not kept. At most one layer is in
    memory, or a block while the model is run once to learn the energies of inputs. Arrays and report are those of
    `quantize_model`.

    Args:
        model: A model whose weights lie on disk, loaded lazily.
        plan: From `plan_in_pieces`.
        store: Where the arrays go. Layers that it has outcomes of are not done again.
        progress: Show progress lines.

    Raises:
        QuantizationError: Weights stand in the way: NaN, infinite, or such as would overflow.
    """
    before = len(store.outcomes)
    with same_random_stream(), held_cache(min(cache_limit(), _CACHE_BYTES)), track_memory() as memory:
        plan, notes = _informed(model, plan, store)
        with progress_bar("quantizing", len(plan.layers), enabled=progress) as bar:
            for layer in plan.layers:
                bar.update(text=layer.path)
                if layer.path not in store.outcomes:
                    store.finish(apply_layer(layer, plan.method, plan.effort, _writer(store)))
                bar.advance()
        packed = {path for layer in plan.layers for path in layer.paths}
        arrays: dict[str, mx.array] = dict(tree_flatten(model.model.parameters()))
        for name, array in arrays.items():
            if name.rpartition(".")[0] not in packed:
                store.write(name, read_array(array))
    if before:
        notes += (f"{before} of {len(plan.layers)} layers were there from an earlier call that had not ended.",)
    return report_of(plan, store.outcomes, memory, None, None, notes)


def _writer(store: Store) -> Put:
    def put(site: Site, module: nn.Module) -> None:
        for name, array in own_arrays(module).items():
            read = read_array(array)
            for path in site.paths:
                store.write(f"{path}.{name}", read)

    return put


def _informed(model: WalkedModel, plan: QuantizationPlan, store: Store) -> tuple[QuantizationPlan, tuple[str, ...]]:
    """The plan with the energies of inputs where its method counts them, and its weights found fit to be packed."""
    known = store.energies
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
