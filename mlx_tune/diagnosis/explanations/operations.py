"""Errors of shapes, dtypes and operations."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX, MLX_EXAMPLES, KnownError

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
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
    KnownError(
        "bfloat16 to NumPy",
        r"PEP 3118 buffer format string",
        "'bfloat16' is not a valid PEP 3118 buffer format string",
        "NumPy has no bfloat16, so `np.array(x)` of such an array fails.",
        ("Convert first: `np.array(x.astype(mx.float32))`.",),
        (MLX + "issues/3974",),
    ),
    KnownError(
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
    KnownError(
        "Quantized input on the CPU",
        r"\[(QQMatmul|GatherQQMM)\] NYI",
        "[QQMatmul] NYI",
        "Multiplying quantized activations (`quantize_input=True`, modes nvfp4 and mxfp8) is not written for the CPU.",
        ("Quantize weights only there: `mt.quantize_model(model, 4)` without `activations=True`.",),
        (MLX + "blob/main/mlx/backend/cpu/quantized.cpp",),
    ),
    KnownError(
        "Two widths that differ in a product",
        r"\[(matmul|addmm|qqmm|block_masked_mm|quantized_matmul|gather_qmm|gather_mm)\] Last dimension of first input",
        "ValueError: [addmm] Last dimension of first input with shape (1,1500,1280) must match second to last "
        "dimension of second input with shape (320,1280).",
        "The input's last dimension is not the layer's input width. Either the input has another width or its "
        "axes in another order, or the layer's weight is packed and used as if it were plain: at 8 bits a "
        "packed row is a quarter of the width, at 4 bits an eighth.",
        (
            "Print the shapes of the input and of `layer.weight`.",
            "If the weight's width is a fraction of the input's, the layer was not quantized before its weights were "
            "loaded: see that `config.json` has `quantization`, and load strictly.",
        ),
        (
            "https://github.com/mustafaaljadery/lightning-whisper-mlx/issues/24",
            MLX_EXAMPLES + "issues/247",
            MLX + "blob/main/mlx/ops.cpp",
        ),
    ),
    KnownError(
        "Shapes that cannot be broadcast",
        r"\[broadcast_shapes\] Shapes",
        "ValueError: [broadcast_shapes] Shapes (64,64) and (3,3) cannot be broadcast.",
        "Two arrays of an element-wise operation, or the value and the place of an assignment, have dimensions "
        "that are neither equal nor 1. In training it is often a mask or labels of another length than the "
        "logits, or an optimizer whose state belongs to another model.",
        (
            "Print both shapes; MLX aligns them at the last dimension.",
            "Make the optimizer anew after layers were replaced (LoRA, quantization): its state keeps the old shapes.",
        ),
        (MLX + "blob/main/mlx/utils.cpp",),
    ),
    KnownError(
        "Targets that do not fit the logits",
        r"Targets shape .* does not match logits shape",
        "ValueError: Targets shape (2, 1) does not match logits shape (2, 4).",
        "`nn.losses.cross_entropy` takes class numbers without the last axis of the logits, `[batch, length]` "
        "for logits `[batch, length, vocabulary]`, or probabilities of the same shape.",
        (
            "Drop an axis of length 1: `targets.squeeze(-1)`.",
            "Shift inputs and targets by one token alike: `model(tokens[:, :-1])` against `tokens[:, 1:]`.",
        ),
        (MLX + "blob/main/python/mlx/nn/losses.py",),
    ),
    KnownError(
        "Arrays that cannot be joined",
        r"\[concatenate\] All the input array",
        "ValueError: [concatenate] All the input array dimensions must match exactly except for the "
        "concatenation axis. However, the provided shapes are (1,8,4,64), (1,4,4,64), and the concatenation "
        "axis is 2.",
        "The arrays differ outside the axis along which they are joined. For keys and values of a cache that "
        "means other heads or another batch: the cache belongs to another model, or to another number of "
        "requests.",
        (
            "Print the shapes; a cache begins anew with `make_prompt_cache(model)`.",
            "Rows of different lengths have to be padded before they become a batch.",
        ),
        (MLX + "blob/main/mlx/ops.cpp", MLX + "pull/543"),
    ),
    KnownError(
        "A shape with another number of values",
        r"\[reshape\] Cannot reshape array of size",
        "ValueError: [reshape] Cannot reshape array of size 8192 into shape (1,1,32,2,100).",
        "The new shape does not hold as many values as the array. In attention it means that the number of "
        "heads or their width in the configuration is not that of the weights.",
        (
            "Compare `num_attention_heads`, `num_key_value_heads` and `head_dim` with the widths of the projections.",
            "Leave one dimension to MLX: `x.reshape(batch, length, heads, -1)`.",
        ),
        (MLX + "blob/main/mlx/primitives.cpp",),
    ),
    KnownError(
        "Channels in another place",
        r"\[conv\] Expect the input channels",
        "ValueError: [conv] Expect the input channels in the input and weight array to match but got shapes - input: "
        "(1,384,3,384) and weight: (1152,14,14,3)",
        "MLX's convolutions take channels last: inputs `[batch, height, width, channels]`, weights `[out, "
        "height, width, in]`. Images and weights from PyTorch have them second.",
        (
            "Inputs: `x.transpose(0, 2, 3, 1)` for images, `x.transpose(0, 2, 1)` for sequences.",
            "Weights: `w.transpose(0, 2, 3, 1)`, once, where they are loaded. A kernel of width 1 needs it too.",
        ),
        (
            MLX + "issues/2116",
            "https://github.com/Blaizzy/mlx-embeddings/issues/21",
            "https://github.com/Blaizzy/mlx-audio/pull/715",
        ),
    ),
    KnownError(
        "A mask that is more precise than attention",
        r"\[scaled_dot_product_attention\] Mask type must promote to output type",
        "ValueError: [scaled_dot_product_attention] Mask type must promote to output type bfloat16.",
        "An additive mask in float32 would lose precision in attention that is computed in bfloat16 or float16,"
        " and MLX does not do that by itself.",
        (
            "Give the mask the dtype of the queries: `mask.astype(queries.dtype)`.",
            "Or use a boolean mask, or `mask='causal'`, which needs no array.",
        ),
        ("https://github.com/jundot/omlx/issues/2305", MLX + "blob/main/mlx/fast.cpp"),
    ),
    KnownError(
        "Queries, keys and values that do not fit",
        r"\[scaled_dot_product_attention\] (?!Mask type)",
        "ValueError: [scaled_dot_product_attention] n_heads must be a multiple of n_kv_heads, found n_heads 3 for "
        "n_kv_heads 2.",
        "`mx.fast.scaled_dot_product_attention` takes `[batch, heads, length, width]` in a floating-point "
        "dtype, with a number of query heads that the number of key heads divides.",
        (
            "Bring heads before length: `x.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)`.",
            "Keys and values need the width and the batch of the queries; they need not be repeated for shared heads.",
        ),
        (MLX + "blob/main/mlx/fast.cpp",),
    ),
    KnownError(
        "Indices that are not whole numbers",
        r"Got indices with invalid dtype",
        "ValueError: [gather] Got indices with invalid dtype. Indices must be integral.",
        "An embedding or an indexing operation got floats where it needs token ids or positions. In a pipeline, hidden "
        "states may have gone to the first layer instead of a later one.",
        (
            "Make token ids whole numbers: `tokens.astype(mx.int32)`.",
            "For `mt.estimate_memory` and `mt.autobatch`, see that `make_batch` returns ids: "
            "`mx.random.randint(0, vocabulary, (n, length))`.",
        ),
        ("https://github.com/exo-explore/exo/issues/133", MLX + "blob/main/mlx/ops.cpp"),
    ),
    KnownError(
        "Indexing with a mask",
        r"boolean indices are not yet supported|Cannot index mlx array using the given type",
        "ValueError: boolean indices are not yet supported",
        "MLX has no `x[mask]`: the shape of the result would depend on values. Nor does it take every kind of number "
        "as an index.",
        (
            "Keep the shape: `mx.where(mask, x, other)`.",
            "Make an index a Python number or an array: `x[int(i)]`.",
        ),
        (MLX + "issues/860", MLX + "issues/2710"),
    ),
    KnownError(
        "Whole numbers in a product",
        r"\[\w+\] Only (inexact types|real floating( point)? types( except float64)?) are supported"
        r"|dtype must be inexact",
        "ValueError: [matmul] Only inexact types are supported but int32 and int32 were provided which results "
        "in int32, which is not a floating point type.",
        "Products of matrices are computed in floating point only.",
        ("Convert first: `x.astype(mx.float32)`, or the dtype of the weights.",),
        (MLX + "blob/main/mlx/ops.cpp",),
    ),
    KnownError(
        "float64 on the GPU",
        r"float64 is not supported on the GPU",
        "ValueError: float64 is not supported on the GPU",
        "GPUs compute in float32 and less. An array became float64 because it came from NumPy with this dtype "
        "by request, or was made so.",
        (
            "Use float32: `x.astype(mx.float32)` on the processor, or `np.float32` before `mx.array`.",
            "Where the precision is needed, compute there on the processor: `with mx.stream(mx.cpu): ...`.",
        ),
        (MLX + "issues/799", "https://github.com/ml-explore/mlx-swift/issues/269"),
    ),
    KnownError(
        "A dtype that scatter does not take on the GPU",
        r"\[Scatter\w*::eval_gpu\] Does not support",
        "[Scatter::eval_gpu] Does not support int64",
        "Assignments and additions at indices (`x.at[i].add(y)`, `x[i] = y`) are written for fewer dtypes on "
        "the GPU than on the processor.",
        ("Use int32 or float32 there, or compute it on the processor: `with mx.stream(mx.cpu): ...`.",),
        (MLX + "issues/1076", MLX + "blob/main/mlx/backend/metal/indexing.cpp"),
    ),
    KnownError(
        "An object that is no array",
        r"Invalid type\s+\S+ received in array initialization|Initialization encountered non-uniform length",
        "ValueError: Invalid type NoneType received in array initialization.",
        "`mx.array` takes numbers, lists of one length at each level, and arrays of NumPy or others that share their "
        "memory.",
        (
            "Rows of different lengths: pad them first.",
            "A tensor of PyTorch: `mx.array(tensor.float().numpy())`.",
            "`None` in a list: leave it out, or put a number in its place.",
        ),
        (MLX + "issues/1703", MLX + "blob/main/python/src/convert.cpp"),
    ),
    KnownError(
        "Plain weights in a quantized product",
        r"The weight matrix should be uint32",
        "ValueError: [quantized_matmul] The weight matrix should be uint32 but received float16",
        "A quantized layer holds a weight that is not packed. Either plain weights were loaded into it without "
        "a check, or the whole model was cast and the packed weights with it.",
        (
            "Cast only what is floating point: `model.set_dtype(mx.bfloat16)` does, "
            "`tree_map(lambda p: p.astype(...), ...)` does not.",
            "Load with `strict=True`, and see that `quantization` in `config.json` is what the file has.",
        ),
        ("https://github.com/priontific/MLX-text-completion-notebook/issues/1", MLX + "blob/main/mlx/ops.cpp"),
    ),
    KnownError(
        "Scales of another number of bits or group size",
        r"The shapes of the weight and scales are incompatible based on bits and group_size"
        r"|Shape of scales and biases does not match the matrix given the quantization parameters",
        "ValueError: [quantized_matmul] The shapes of the weight and scales are incompatible based on bits and "
        "group_size. w.shape() == (64,8) and scales.shape() == (64,1) with group_size=32 and bits=4",
        "A packed weight is used with other `bits` or another `group_size` than it was quantized with; in a model, the "
        "configuration says something else than the file.",
        (
            "Give `bits`, `group_size` and `mode` of the quantization: bits are `32 * w.shape[-1] / width`, the"
            " group size is `width / scales.shape[-1]`.",
            "In `config.json`, look for layers with an entry of their own under `quantization`.",
        ),
        (MLX + "issues/550", MLX + "blob/main/mlx/ops.cpp"),
    ),
    KnownError(
        "A format of quantization that does not exist",
        r"\[quantize\] The requested (number of bits|group size)|\[\w+\] \w+ quantization requires (group size|bits)",
        "ValueError: [quantize] mxfp4 quantization requires group size 32 but got 64.",
        "Each mode has its own sizes: affine groups of 32, 64 or 128; mxfp4 and mxfp8 groups of 32; nvfp4 "
        "groups of 16.",
        (
            "Leave `group_size` and `bits` out, or give those of the mode; `mt.quantize_model(model, "
            "mode='mxfp4')` does.",
        ),
        (
            "https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html",
            MLX + "blob/main/mlx/ops.cpp",
        ),
    ),
)
