"""The methods that are compared: this library's, and mlx-lm's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from quantization_judging import WINDOW, load

import mlx_tune as mt
from mlx_tune.quantization.learning.dwq import train_dwq
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel

GROUP = 64
THEIRS = ("nearest", "gptq", "awq", "dwq")


def ours(
    method: str, bits: int, group: int, calibration: list[mx.array], skip: tuple[str, ...] = ()
) -> Callable[[nn.Module], nn.Module]:
    """One of this library's methods, all kernels taken for right: the judge multiplies what the weights stand for."""
    name, _, effort = method.partition(" ")

    def quantize(model: nn.Module) -> nn.Module:
        learn = calibration if name in ("gptq", "dwq") else None
        report = mt.quantize_model(
            model,
            bits,
            group,
            method=name,
            effort=effort or "fast",
            calibration=learn,
            skip=skip,
            verify_kernels=False,
            progress=False,
        )
        _tell(report.notes)
        return model

    return quantize


def dwq_after_gptq(path: str, model: nn.Module, calibration: list[mx.array]) -> nn.Module:
    """What "dwq" does once it has done what "gptq" does."""
    _tell(
        [
            train_dwq(
                WalkedModel(model),
                load(path),
                read_batches(calibration, "calibration"),
                recompute=mt.checkpoint_blocks,
                progress=False,
            ).summary
        ]
    )
    return model


def mixed(
    method: str,
    target_bytes: int,
    bits: int,
    group: int,
    calibration: list[mx.array],
    skip: tuple[str, ...] = (),
    formats: dict[str, dict[str, Any]] | None = None,
) -> Callable[[nn.Module], nn.Module]:
    """Bits chosen layer by layer, or formats that were chosen before."""

    def quantize(model: nn.Module) -> nn.Module:
        report = mt.quantize_model(
            model,
            bits,
            group,
            method=method,
            target_bytes=None if formats else target_bytes,
            overrides=formats,
            calibration=calibration,
            skip=skip,
            verify_kernels=False,
            progress=False,
        )
        _tell(report.notes)
        vars(model)["formats"] = {  # past the module's own store, where a dictionary would be parameters
            layer.path: {"bits": layer.bits, "group_size": layer.group_size, "mode": layer.mode}
            for layer in report.layers
            if layer.bits is not None
        }
        return model

    return quantize


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"    {note}", flush=True)


def theirs(method: str, bits: int, data: np.ndarray, target: float = 0.0) -> Callable[[nn.Module], nn.Module]:
    """One of mlx-lm's methods, on the same tokens."""

    def quantize(model: nn.Module) -> nn.Module:
        # On a CPU, half precision has no fast product. Scales end up in the model's own dtype either way.
        cpu = mx.default_device() == mx.Device(mx.cpu)
        if cpu:
            model.set_dtype(mx.float32)
        done = by_mlx_lm(method, model, bits, data, target)
        if cpu:
            done.set_dtype(mx.bfloat16)
        return done

    return quantize


def by_mlx_lm(method: str, model: nn.Module, bits: int, data: np.ndarray, target: float = 0.0) -> nn.Module:
    """The same in the model's own dtype."""
    inputs = mx.array(data[:, :-1])
    if method == "nearest":
        nn.quantize(model, GROUP, bits)
        return model
    if method == "gptq":
        from mlx_lm.quant.gptq import gptq_quantize

        return gptq_quantize(model, inputs, bits, GROUP, bits, GROUP)[0]
    if method == "awq":
        from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

        few = inputs[: max(8, 16384 // inputs.shape[1])]
        awq_quantize(model, few, AWQ_MODEL_CONFIGS["llama"], GROUP, bits, GROUP, bits)
        return model
    if method == "dwq":
        from mlx.optimizers import Adam
        from mlx_lm.quant.dwq import dwq_quantize

        best: tuple[float, nn.Module] | None = None
        lines = [(list(map(int, line[: WINDOW + 1])), 0) for line in data]
        rates = (1e-6, 1e-5, 1e-4)  # it has no way to choose, so it gets the best of three
        dtype = next(array.dtype for _, array in tree_flatten(model.parameters()))
        for rate in rates:
            student = copy.deepcopy(model)
            nn.quantize(student, GROUP, bits)
            held = lines[::8]
            rest = [line for i, line in enumerate(lines) if i % 8]
            dwq_quantize(
                student, lambda batch, *_, **__: model(batch), Adam(rate, bias_correction=True), rest, held, 4,
                WINDOW + 1, 0, dtype,
            )  # fmt: skip
            inputs_held = mx.array(np.array([line for line, _ in held])[:, :-1])
            loss = _divergence(model(inputs_held), student(inputs_held))
            if best is None or loss < best[0]:
                best = loss, student
        assert best is not None
        best[1].share_of_time = 1 / len(rates)
        return best[1]
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

    # Two levels around the target, as its command line has them: 4 and 5 bits for 5 bits per weight.
    low, high = math.ceil(target - 1.5), math.floor(target + 0.5)
    found = dict(estimate_sensitivities(model, inputs, low, GROUP, high, GROUP))
    threshold = estimate_threshold(model, found, target, low, GROUP, high, GROUP)

    def choose(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": high, "group_size": GROUP} if found[path] > threshold else True

    nn.quantize(model, GROUP, low, class_predicate=choose)
    return model


def _divergence(before: mx.array, after: mx.array) -> float:
    lx, ly = (z.astype(mx.float32) - mx.logsumexp(z.astype(mx.float32), -1, keepdims=True) for z in (before, after))
    return (mx.exp(lx) * (lx - ly)).sum(-1).mean().item()
