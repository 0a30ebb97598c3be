"""Errors of shapes, dtypes and operations."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.entry import MLX, Entry

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "A width that the group size does not divide",
        r"\[quantize\] (The last dimension of the matrix needs to|All dimensions should) be divisible by",
        "[quantize] The last dimension of the matrix needs to be divisible by the quantization group size 64. However "
        "the provided matrix has shape (128,4304).",
        "Quantization works on groups of neighbouring weights in a row, and this row is not a whole number of groups. "
        "MLX does not say which layer it is.",
        (
            "`mt.plan_quantization(model, 4, 64)` names every such layer and what will be done about it; "
            "`mt.quantize_model` picks a group size that divides or leaves the layer alone, and says so.",
            "By hand: a smaller group size (32), or `class_predicate` to leave the layer out.",
        ),
        (MLX + "issues/1033",),
    ),
    Entry(
        "bfloat16 to NumPy",
        r"PEP 3118 buffer format string",
        "'bfloat16' is not a valid PEP 3118 buffer format string",
        "NumPy has no bfloat16, so `np.array(x)` of such an array fails.",
        ("Convert first: `np.array(x.astype(mx.float32))`.",),
        (MLX + "issues/3974",),
    ),
    Entry(
        "An operation that the GPU lacks",
        r"This op is not yet supported on the GPU|\[\w+::eval_gpu\] .*NYI",
        "[linalg::svd] This op is not yet supported on the GPU. Explicitly pass a CPU stream to run it.",
        "Decompositions, inverses and solvers of `mx.linalg` are written for the processor alone. On a Mac it "
        "shares its memory with the GPU, so nothing is copied.",
        (
            "Give the operation the processor: `mx.linalg.svd(x, stream=mx.cpu)`.",
            "In a library that does not pass a stream on: `with mx.stream(mx.cpu): ...` around the call.",
        ),
        (MLX + "issues/1238", MLX + "issues/1258", MLX + "blob/main/mlx/linalg.cpp"),
    ),
    Entry(
        "Quantized input on the CPU",
        r"\[(QQMatmul|GatherQQMM)\] NYI",
        "[QQMatmul] NYI",
        "Multiplying quantized activations (`quantize_input=True`, modes nvfp4 and mxfp8) is not written for the CPU.",
        ("Quantize weights only there: `mt.quantize_model(model, 4)` without `activations=True`.",),
        (MLX + "blob/main/mlx/backend/cpu/quantized.cpp",),
    ),
)
