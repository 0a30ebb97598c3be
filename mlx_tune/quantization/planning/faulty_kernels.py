"""Models whose packed layers are all computed right here: layers that would not be stay, or become, unpacked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FunctionType

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import BackendError
from mlx_tune.progress import progress_bar
from mlx_tune.quantization.formats.modes import ITEM_BYTES, Format
from mlx_tune.quantization.models.layers import (
    EMBEDDINGS,
    current_format,
    dense_twin,
    has_dense_class,
    is_quantized,
    weight_shape,
)
from mlx_tune.quantization.models.sites import WalkedModel, own_arrays
from mlx_tune.quantization.planning.excluded_formats import FaultOf
from mlx_tune.quantization.planning.kernel_trials import default_backend, fault_in
from mlx_tune.quantization.planning.kernels import Fault, Use, combinations, note_of
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan, notes_of
from mlx_tune.units import dtype_name
from mlx_tune.upstream import frozen


def fault_finder(model: WalkedModel) -> FaultOf:
    """A function that tells what is wrong with the kernels that a layer would need in a format, each tried once.

    Args:
        model: The model that the layers are of.

    Examples:
        >>> from mlx_tune.quantization.dry_run import plan_quantization
        >>> plan = plan_quantization(nn.Sequential(nn.Linear(128, 64)))
        >>> find = fault_finder(WalkedModel(nn.Sequential(nn.Linear(128, 64))))
        >>> print(find(plan.layers[0], plan.layers[0].format))
        None
    """
    tied = ties_embeddings(model)
    known: dict[str, tuple[Use, ...]] = {}

    def find(layer: LayerPlan, wanted: Format) -> Fault | None:
        if layer.path not in known:
            known[layer.path] = tuple(dict.fromkeys(use for x in layer.sites for use in uses_of(x.module, tied)))
        return _first_fault(known[layer.path], layer.shape, wanted, layer.dtype)

    return find


def keep_unpacked(
    plan: QuantizationPlan,
    fault_of: FaultOf,
    *,
    among: Callable[[LayerPlan], bool] = lambda layer: True,
    progress: bool = False,
) -> QuantizationPlan:
    """The plan without the layers that MLX would compute wrong, each with its reason.

    Args:
        plan: A plan.
        fault_of: Finds the fault of a layer in a format.
        among: The layers to look at.
        progress: Show a progress line: CUDA compiles each kernel at its first use.

    Raises:
        BackendError: No layer is left.
    """
    faults: dict[str, Fault] = {}
    with progress_bar("trying kernels", len(plan.layers), enabled=progress) as bar:
        for layer in plan.layers:
            bar.update(text=layer.path)
            fault = fault_of(layer, layer.wanted) if among(layer) else None
            if fault is not None:
                faults[layer.path] = fault
            bar.advance()
    if not faults:
        return plan
    saved = {layer.path: layer.bytes_before - layer.bytes_after for layer in plan.layers}
    without = plan.with_formats(dict.fromkeys(faults))
    skipped = tuple(
        replace(x, reason=faults[x.path].reason, cost_bytes=max(0, saved[x.path])) if x.path in faults else x
        for x in without.skipped
    )
    notes = note_of(((fault, 1) for fault in faults.values()), "left unpacked")
    if not without.layers:
        raise BackendError(
            f"No layer can be packed as asked. {' '.join(notes)} Choose other bits, another group_size or mode; "
            "verify_kernels=False is for models that will run on another machine."
        )
    return replace(without, skipped=skipped, notes=(*notes_of(without.layers, skipped), *notes))


def unpack_faulty(model: nn.Module, *, evaluate: bool = True) -> tuple[str, ...]:
    """Unpack those layers of a quantized model that MLX would compute wrong here.

    Args:
        model: A model that was quantized by whatever means; changed in place.
        evaluate: True where to compute the unpacked weights at once, one layer after another.

    Returns:
        A note for each fault; none where all is right, or nothing is packed.

    Examples:
        >>> unpack_faulty(nn.Sequential(nn.Linear(128, 64).to_quantized()))
        ()
    """
    walked = WalkedModel(model)
    tied, others = ties_embeddings(walked), _float_dtype(walked)
    unpacked: list[tuple[Fault, int]] = []
    stuck: list[tuple[Fault, int]] = []
    for site in walked.sites:
        if not is_quantized(site.module):
            continue
        scales = site.module["scales"].dtype
        dtype = dtype_name(scales) if dtype_name(scales) in ITEM_BYTES else others
        wanted = current_format(site.module)
        fault = _first_fault(uses_of(site.module, tied), weight_shape(site.module), wanted, dtype)
        if fault is None:
            continue
        if not site.path or not has_dense_class(type(site.module)):
            stuck.append((fault, len(site.paths)))
            continue
        with mx.stream(mx.cpu):  # where unpacking is right, whatever the device does
            twin = dense_twin(site.module, getattr(mx, dtype))
        # Packed weights are frozen, and so is what stands for them: the same parameters are trained as before.
        twin.freeze(recurse=False, keys=[name for name in twin if name in frozen(site.module)])
        if evaluate:
            mx.eval(twin["weight"])
        site.put(twin)
        unpacked.append((fault, len(site.paths)))
    no_class = "left packed, there being no unpacked class to put in its place: its results are wrong here, and nothing"
    return (*note_of(unpacked, "unpacked"), *note_of(stuck, f"{no_class} was done"))


def uses_of(module: nn.Module, tied: bool) -> tuple[Use, ...]:
    """The uses that a layer makes of its weights, packed or to be packed.

    Args:
        module: The layer.
        tied: True where embeddings may be used as the last layer, too.

    Examples:
        >>> uses_of(nn.Linear(64, 64), tied=True), uses_of(nn.Embedding(64, 64), tied=True)
        (('product',), ('lookup', 'product'))
    """
    if isinstance(module, EMBEDDINGS):
        return ("lookup", "product") if tied else ("lookup",)
    if len(weight_shape(module)) == 2:
        return ("product",)
    return ("gathered",) if _names_any(type(module), {"gather_mm", "gather_qmm"}) else ("batched",)


def ties_embeddings(model: WalkedModel) -> bool:
    """True where a module's code uses an embedding as a linear layer, and its configuration does not deny it.

    Examples:
        >>> ties_embeddings(WalkedModel(nn.Sequential(nn.Embedding(64, 64))))
        False
    """
    for site in model.sites:
        config = getattr(site.module, "args", getattr(site.module, "config", None))
        untied = getattr(config, "tie_word_embeddings", True) is False
        if not untied and _names_any(type(site.module), {"as_linear"}):
            return True
    return False


def _first_fault(uses: tuple[Use, ...], shape: tuple[int, ...], wanted: Format, dtype: str) -> Fault | None:
    for tried in combinations(uses, shape, wanted, dtype, default_backend()):
        fault = fault_in(tried)
        if fault is not None:
            return fault
    return None


def _names_any(kind: type, names: set[str]) -> bool:
    """True where a method of a class, or of one that it inherits from outside MLX, asks for one of these attributes."""
    return any(names & set(function.__code__.co_names) for function in _methods(kind))


def _methods(kind: type) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] != "mlx":
            yield from (value for value in vars(base).values() if isinstance(value, FunctionType))


def _float_dtype(model: WalkedModel) -> str:
    """The commonest floating point dtype of a model's unpacked arrays."""
    counts = Counter(dtype_name(a.dtype) for site in model.sites for a in own_arrays(site.module).values())
    found = [(count, name) for name, count in counts.items() if name in ITEM_BYTES]
    return max(found)[1] if found else "bfloat16"
