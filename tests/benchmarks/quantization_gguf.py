"""llama.cpp's quantizations of a Llama by ggml's own quantizer, in the mixes that llama.cpp makes of them.

Takes the packages `gguf` and `libggml-python`. Which tensor gets which type follows `llama_tensor_get_type_impl` and
`tensor_type_fallback` of llama.cpp's src/llama-quant.cpp for a dense Llama. An importance matrix is the mean square of
each input on calibration text, and the output layer has none, both as llama-imatrix has it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_tune.substitution import ModuleCall, intercepted

#: The mixes, each with the type of most of its tensors.
MIXES = {
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "IQ4_XS": "IQ4_XS",
    "IQ4_NL": "IQ4_NL",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
}

#: Types in blocks of 32 for rows that do not divide into blocks of 256.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

_BIG = 256


def by_ggml(
    mix: str, importance: Callable[[], dict[str, mx.array]], skip: Sequence[str] = ()
) -> Callable[[nn.Module], nn.Module]:
    """A mix, with an importance matrix or an empty one; the model's weights become what they then stand for in float32.

    Layers that match a pattern of `skip` stay as they are.
    """

    def quantize(model: nn.Module) -> nn.Module:
        arguments: Any = model.args
        gqa = arguments.num_attention_heads // arguments.num_key_value_heads
        energies = importance()
        stored = 0
        layers: Any = model.named_modules()
        for path, module in layers:
            if isinstance(module, nn.Linear | nn.Embedding):
                if any(fnmatch(path, pattern) for pattern in skip):
                    stored += module.weight.nbytes
                    continue
                columns = module.weight.shape[-1]
                kind = type_of(path, columns, mix, arguments.num_hidden_layers, gqa, imatrix=bool(energies))
                source = np.array(module.weight.astype(mx.float32))
                weights, taken = _there_and_back(source, kind, energies.get(path))
                module.weight, stored = mx.array(weights), stored + taken
            elif "weight" in module:
                stored += 4 * module.weight.size  # llama.cpp keeps one-dimensional tensors in float32
        model.stored_bytes = stored
        return model

    return quantize


def type_of(path: str, columns: int, mix: str, blocks: int, gqa: int, *, imatrix: bool) -> str:
    """The type of a tensor: which layers of a mix get more than the rest.

    Examples:
        >>> type_of("model.layers.0.mlp.down_proj", 512, "Q2_K", 8, 2, imatrix=False)
        'Q3_K'
        >>> type_of("model.layers.0.mlp.down_proj", 512, "Q2_K alone", 8, 2, imatrix=False)
        'Q2_K'
    """
    kind = MIXES.get(mix, mix.removesuffix(" alone"))
    found = re.search(r"layers\.(\d+)\.", path)
    name = path.rpartition(".")[2]
    if mix not in MIXES:
        return _FALLBACK[kind] if columns % _BIG else kind
    if found is None:  # an output layer, or an embedding that is one as well
        return "Q8_0" if columns % _BIG and kind != "IQ4_NL" else "Q6_K"
    i = int(found[1])
    early = i < blocks // 8
    more = early or i >= 7 * blocks // 8 or (i - blocks // 8) % 3 == 2
    if name == "v_proj":
        kind = {
            "Q2_K": "Q4_K" if gqa >= 4 else "Q3_K",
            "Q2_K_S": "Q4_K" if gqa >= 4 else kind,
            "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": "Q5_K" if gqa >= 4 else kind,
            "IQ4_XS": "Q5_K" if gqa >= 4 else kind,
            "Q4_K_M": "Q6_K" if more else kind,
            "Q5_K_M": "Q6_K" if more else kind,
            "Q4_K_S": "Q5_K" if i < 4 else kind,
        }.get(mix, kind)
    elif name == "down_proj":
        kind = {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if early else kind,
            "Q3_K_M": "Q5_K" if i < blocks // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_M": "Q6_K" if more else kind,
            "Q5_K_M": "Q6_K" if more else kind,
            "Q4_K_S": "Q5_K" if early else kind,
            "IQ4_NL": "Q5_K" if early and not imatrix else kind,
            "IQ4_XS": "Q5_K" if early and not imatrix else kind,
        }.get(mix, kind)
    elif name == "o_proj":
        kind = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, kind)
    return _FALLBACK.get(kind, kind) if columns % _BIG else kind


def energies_of(model: nn.Module, calibration: list[mx.array]) -> dict[str, mx.array]:
    """The importance matrix of every linear layer `[inputs]`, by its path."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    paths = {id(module): path for path, module in layers.items()}
    sums: dict[str, mx.array] = {}
    count = 0

    def see(call: ModuleCall) -> object:
        rows: Any = call.inputs
        path = paths[id(call.module)]
        sums[path] = sums.get(path, 0.0) + mx.square(rows.reshape(-1, rows.shape[-1]).astype(mx.float32)).sum(0)
        return call.run()

    for batch in calibration:
        with intercepted(layers.values(), see):
            model(batch[:, :-1])
        mx.eval(sums)
        count += batch[:, :-1].size
    return {path: total / count for path, total in sums.items()}


def _there_and_back(weight: np.ndarray, kind: str, energy: mx.array | None) -> tuple[np.ndarray, int]:
    """The float32 numbers that a quantized weight stands for, and its bytes."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weight.shape
    packed = np.empty((rows, columns // block * size), dtype=np.uint8)
    source = np.ascontiguousarray(weight, dtype=np.float32)
    matrix = None if energy is None else np.ascontiguousarray(np.array(energy), dtype=np.float32)
    _library().ggml_quantize_chunk(
        int(number),
        source.ctypes.data_as(ctypes.c_void_p),
        packed.ctypes.data_as(ctypes.c_void_p),
        0,
        rows,
        columns,
        None if matrix is None else matrix.ctypes.data_as(ctypes.c_void_p),
    )
    return gguf.quants.dequantize(packed, number).astype(np.float32), packed.nbytes


def _library() -> Any:
    import libggml

    folder = Path(libggml.__file__).parent / "lib64"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library
