"""Errors of the backward pass."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX, MLX_LM, MLX_VLM, KnownError

_PRIMITIVES = MLX + "blob/main/mlx/primitives.cpp"

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
        "A gradient through whole numbers",
        r"Cannot calculate VJP with respect to (indices|mask|boolean masks)"
        r"|\[GatherQMM::vjp\] cannot compute the gradient wrt the indices",
        "[gather] Cannot calculate VJP with respect to indices. Use stop_gradient on indices to stop gradients "
        "from being computed.",
        "A gradient is asked for something that has none: token ids or masks that are arguments of a function that is "
        "differentiated or checkpointed.",
        (
            "Use `mt.checkpoint`, which stops the gradients of such arguments; `mx.checkpoint` does not.",
            "Or wrap the argument: `mx.stop_gradient(ids)`.",
        ),
        (_PRIMITIVES,),
    ),
    KnownError(
        "Expert routing that passes its gradient on",
        r"\[(gather|gather_axis|scatter_axis|GatherMM)\] Cannot calculate VJP with respect to indices"
        r"|\[GatherQMM::vjp\] cannot compute the gradient wrt the indices",
        "[gather_axis] Cannot calculate VJP with respect to indices. Use stop_gradient on indices to stop "
        "gradients from being computed.",
        "In a mixture of experts the indices of the chosen experts come out of the router's scores, so the "
        "gradient runs into them. The forward pass and validation work; the first backward pass fails, with and"
        " without checkpointing.",
        (
            "uv pip install -U mlx-lm   # mended architecture by architecture; the traceback names yours",
            "In your own router: `inds = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])`. The "
            "gradient still reaches the router through the scores.",
        ),
        (MLX_LM + "issues/1786", MLX_LM + "issues/1897", MLX_LM + "issues/1449", MLX + "issues/3787"),
    ),
    KnownError(
        "A custom kernel has no gradient",
        r"\[Primitive::(vjp|jvp)\] Not implemented for CustomKernel",
        "ValueError: [Primitive::vjp] Not implemented for CustomKernel.",
        "The model runs a kernel of its own (`mx.fast.metal_kernel`, `mx.fast.cuda_kernel`), and such a kernel has no "
        "backward pass unless somebody wrote one. Checkpointing, another batch size or an unquantized model change "
        "nothing about it.",
        (
            "Call `model.train()` before the first step: mlx-lm's linear attention (Qwen3-Next, Qwen3.5, Kimi Linear) "
            "uses its kernel only in evaluation mode.",
            "uv pip install -U mlx-lm mlx-vlm   # some kernels got a way around them for training",
            "Your own kernel: wrap it in `mx.custom_function` and write its `.vjp`, or use plain operations in "
            "training.",
            "If nothing below it is trained, stop the gradient above it: `mx.stop_gradient(kernel_output)`.",
        ),
        (
            MLX_VLM + "issues/1474",
            "https://github.com/Doriandarko/MLX-GRPO/pull/13",
            MLX_LM + "pull/1168",
            MLX_LM + "blob/main/mlx_lm/models/qwen3_next.py",
        ),
    ),
    KnownError(
        "An operation without a derivative",
        r"\[Primitive::vjp\] Not implemented for (?!CustomKernel)|VJP not implemented for scatter_prod",
        "ValueError: [Primitive::vjp] Not implemented for SVD.",
        "MLX has no backward pass for the operation that the error names: decompositions (SVD, Eigh, QRF, "
        "Cholesky, LUF), or random bits (RandomBits: the gradient ran into a random key among the arguments).",
        (
            "Where it need not be trained through: `mx.stop_gradient` around its input, or around the key.",
            "Otherwise write the derivative with `mx.custom_function`, or reach the goal by other operations.",
        ),
        (_PRIMITIVES, "https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.custom_function.html"),
    ),
    KnownError(
        "An operation without a forward derivative or without vmap",
        r"\[Primitive::(jvp|vmap)\] Not implemented for (?!CustomKernel)|\[\w+::vmap\] NYI",
        "ValueError: [Primitive::jvp] Not implemented for AddMM.",
        "`mx.jvp` and `mx.vmap` know fewer operations than `mx.grad`; the error names one that is missing.",
        (
            "For `jvp`: derivatives through `mx.grad` or `mx.vjp`, which know more operations.",
            "For `vmap`: give the function a batch dimension, or loop over the batch.",
            "uv pip install -U mlx   # operations are added now and then",
        ),
        (MLX + "issues/1771", _PRIMITIVES),
    ),
    KnownError(
        "A gradient of quantized weights",
        r"no gradient wrt the quantized (weights|matrix)",
        "RuntimeError: [QuantizedMatmul::vjp] no gradient wrt the quantized weights.",
        "Packed weights are whole numbers and cannot be trained. They count as trainable where a quantized "
        "model is fully fine-tuned, or where `model.unfreeze()` was called on it.",
        (
            "Train adapters on the frozen model: `model.freeze()`, then `linear_to_lora_layers(...)`.",
            "After an `unfreeze`, freeze what is packed: `model.freeze(keys=['weight', 'scales', 'biases'])` on those "
            "layers.",
            "Full fine-tuning needs weights that are not quantized: load the original, or `mlx_lm.convert "
            "--dequantize`.",
        ),
        (_PRIMITIVES, MLX + "pull/2129"),
    ),
    KnownError(
        "A gradient of scales that are not affine",
        r"no gradient wrt scales in \w+ quantization",
        "ValueError: [QuantizedMatmul::vjp] no gradient wrt scales in mxfp4 quantization.",
        "The scales of mxfp4, mxfp8 and nvfp4 are numbers of 8 bits, without a gradient. Only affine scales and biases "
        "can be trained.",
        (
            "Freeze them: `model.freeze(keys=['scales'], recurse=True)`.",
            "To learn scales (`method='dwq'`), quantize with `mode='affine'`.",
        ),
        (_PRIMITIVES, MLX + "pull/2129"),
    ),
    KnownError(
        "A loss that is not one number",
        r"\[vjp\] Output shape .* does not (match )?cotangent shape"
        r"|\[(grad|value_and_grad)\] The return value of the function whose gradient we want to compute",
        "ValueError: [vjp] Output shape (4,512) does not match cotangent shape (). If you are using grad your function "
        "must return a scalar.",
        "`mx.grad` and `nn.value_and_grad` need a loss with an empty shape, as the only value or the first of a tuple. "
        "Shapes like (1,) do not count, and a Python number (from `.item()`) has no gradient.",
        (
            "End the loss with `.mean()` or `.sum()` (or `.squeeze()` for one number), and return it first.",
            "Leave out `.item()` and `float()` inside the function.",
        ),
        (MLX + "issues/2169", MLX + "issues/487", MLX + "blob/main/python/src/transforms.cpp"),
    ),
)
