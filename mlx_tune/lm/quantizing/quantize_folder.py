"""`lm.quantize_folder`: a model that is larger than memory, from one folder to another, layer by layer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_tune.errors import QuantizationError
from mlx_tune.files.unfinished import Resumable
from mlx_tune.lm.loading import cast_parameters, load
from mlx_tune.lm.quantizing.folder_store import FolderStore
from mlx_tune.lm.saving import check_new, describe, put_in_place, write_companions
from mlx_tune.memory import memory_budget
from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.in_pieces import as_planned, plan_in_pieces, quantize_in_pieces
from mlx_tune.quantization.judging.report import QuantizationReport
from mlx_tune.quantization.models.batches import Batch, read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.plan import QuantizationPlan
from mlx_tune.quantization.planning.request import Request
from mlx_tune.version import __version__

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

#: What packing a layer takes beside the packed ones, as a multiple of it: its weights, and what is made of them.
_BESIDE = 2

#: Methods that look at one layer or block after another.
METHODS = ("nearest", "optimal", "gptq")


def quantize_folder(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    bits: int = 4,
    group_size: int = 64,
    *,
    method: str = "optimal",
    mode: str = "affine",
    effort: Effort = "fast",
    overrides: Mapping[str, bool | Mapping[str, object]] | None = None,
    skip: Iterable[str] | str | None = None,
    activations: bool = False,
    requantize: bool = False,
    scale_dtype: mx.Dtype | str | None = None,
    dtype: str | None = None,
    calibration: Iterable[object] | None = None,
    verify_kernels: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a model from one folder into another, without ever holding it in memory.

    Each layer is read, packed, written to its place in the new files and forgotten. Weights, configuration and report
    are those of `mlx_tune.quantize_model` and `save_quantized`, bit for bit. At most one block, as stored, is in memory
    at a time, and what packing takes beside it: about 1.5 times the largest block, and less than 1 GB for the rest.
    "gptq" takes besides some ten float32 matrices of a layer's inputs by its inputs: 8 GB where those are 14,336. The
    inputs of layers from the calibration wait on disk.

    Until it is whole, the model lies in a folder beside the destination, whose name is that of the destination with
    `.unfinished` after it. Its journal says which layers are done: where a call was interrupted or killed, or the disk
    was full, the same call goes on from there. The destination appears whole or not at all.

    Args:
        source: A folder, or a name on the hub.
        destination: The folder to make. One that is there already must be empty.
        bits: Bits of a code.
        group_size: Weights of a row that share a scale.
        method: "optimal", "nearest" or "gptq", which needs `calibration`. "dwq" holds the model: see
            `mlx_tune.quantize_model`, which explains this and the following arguments.
        mode: "affine", or "mxfp4", "mxfp8", "nvfp4".
        effort: "fast" or "best".
        overrides: Pattern to what matching layers get instead.
        skip: Patterns of layers to leave alone.
        activations: True where layers quantize their inputs too.
        requantize: Quantize layers anew that are quantized already.
        scale_dtype: Of affine scales and biases, instead of that of the weights.
        dtype: Cast the model to this first: "float16", "bfloat16" or "float32".
        calibration: Batches to learn from.
        verify_kernels: Leave layers unpacked that MLX would compute wrong on this machine.
        revision: The branch, tag or commit of a hub name.
        trust_remote_code: Run Python files that come with the model.
        progress: Show progress lines.

    Returns:
        The report, without accuracy: load the new model, and compare it with `mlx_tune.quantization_report` where
        there is memory for both.

    Raises:
        InvalidArgumentError: The destination is not empty, or what an earlier call has left beside it was for another
            task; or `source` is no model's folder.
        QuantizationError: An argument or a layer stands in the way.
        BackendError: MLX cannot do the mode on this backend.
        DiskError: Too little free disk; this is looked at first.

    Examples:
        ```python
        report = lm.quantize_folder("models/large", "models/large-4bit", 4, 64)
        ```
    """
    if method not in METHODS:
        raise QuantizationError(
            f"method={method!r} cannot quantize from folder to folder: it is one of {', '.join(METHODS)}. "
            "mlx_tune.quantize_model has the others, for models that fit in memory."
        )
    learn = read_batches(calibration, "calibration")
    if method == "gptq" and not learn:
        raise QuantizationError("method='gptq' learns from text: pass calibration=[batches].")
    target = Path(destination)
    check_new(target)
    skip = skip if skip is None or isinstance(skip, str) else tuple(skip)
    request = Request(
        bits, group_size, method, mode, effort, overrides, skip, None, None, activations, requantize, scale_dtype
    )
    model, tokenizer, config, folder = load(
        source, lazy=True, revision=revision, trust_remote_code=trust_remote_code, verify_kernels=verify_kernels
    )
    if dtype is not None:
        cast_parameters(model, dtype)
    walked = WalkedModel(model)
    plan = plan_in_pieces(walked, request, verify_kernels=verify_kernels, progress=progress)
    with as_planned(plan):
        described, index, shards = describe(model, config), *_shards(model)
    with (
        Resumable(target) as work,
        FolderStore(work.folder, shards, _task(folder, request, dtype, learn)) as store,
    ):
        try:
            report = quantize_in_pieces(walked, plan, store, calibration=learn, progress=progress)
        finally:
            work.worth_keeping = store.energies is not None
        store.flush()
        (store.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
        write_companions(store.folder, described, tokenizer, folder)
        put_in_place(store.folder, described, target)
    return report


def fits_in_memory(plan: QuantizationPlan, budget_bytes: int | None = None) -> bool:
    """True where `mlx_tune.quantize_model` has room: for the packed model and the layer that it works on.

    Args:
        plan: A plan for a model that was loaded lazily.
        budget_bytes: The room; that of `memory_budget()` by default.
    """
    largest = max(layer.bytes_before for layer in plan.layers)
    budget = memory_budget() if budget_bytes is None else budget_bytes
    return plan.size_after_bytes + _BESIDE * largest <= budget


def _shards(model: nn.Module) -> tuple[dict[str, object], dict[str, dict[str, mx.array]]]:
    """The index and the arrays of each file, as mlx-lm's `save_model` would write them."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import get_total_parameters, make_shards

    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    parts = make_shards(weights)
    name = "model-{:05d}-of-{:05d}.safetensors" if len(parts) > 1 else "model.safetensors"
    shards = {name.format(i, len(parts)): part for i, part in enumerate(parts, start=1)}
    where = {path: name for name, part in shards.items() for path in part}
    total = {
        "total_size": sum(value.nbytes for value in weights.values()),
        "total_parameters": get_total_parameters(model),
    }
    return {"metadata": total, "weight_map": dict(sorted(where.items()))}, shards


def _task(folder: Path, request: Request, dtype: str | None, learn: list[Batch]) -> dict[str, object]:
    """Everything that decides on the outcome: the files, the arguments, the programs."""
    files = sorted([*folder.glob("model*.safetensors"), folder / "config.json"])
    return {
        "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        **{field.name: repr(getattr(request, field.name)) for field in fields(request)},
        "dtype": repr(dtype),
        "calibration": _digest(learn),
        "versions": f"mlx_tune {__version__}, mlx {version('mlx')}",
    }


def _digest(batches: list[Batch]) -> str | None:
    """A digest of what there is to learn from; None where there is nothing."""
    import mlx.core as mx

    found = hashlib.sha256()
    for array in (array for batch in batches for array in batch.arrays):
        found.update(f"{array.shape} {array.dtype}".encode())
        found.update(bytes(array.reshape(-1).view(mx.uint8)))
    return found.hexdigest() if batches else None
