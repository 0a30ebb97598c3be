"""Errors of memory: an array, a buffer or the whole machine."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX, KnownError

_NEED_LESS = (
    "Find the largest batch that fits before training: `mt.autobatch(step, make_batch, state=(model, optimizer))`.",
    "Recompute activations instead of keeping them: `mt.checkpoint_blocks(model)`.",
    "Quantize the model: `mt.quantize_model(model, 4)`.",
)

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
        "Out of memory on an Apple GPU",
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory|Insufficient Memory",
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
        "The GPU ran out of memory while it was working. Up to MLX 0.31 the process is aborted; in 0.32.0 results may "
        "be zeros without a word; since 0.32.1 the error is kept and raised by a later operation, so the line that "
        "raised is not the line that needed the memory, and arrays computed since are not to be trusted.",
        (
            "Stop here: drop what was computed since the last good step, and start the process again.",
            *_NEED_LESS,
        ),
        (MLX + "pull/479", MLX + "issues/3979", MLX + "issues/4134", MLX + "issues/4174"),
    ),
    KnownError(
        "Out of memory on CUDA",
        r"cuda\w*\(.*out of memory|CUDA.*out of memory|cudaErrorMemoryAllocation",
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
        "The GPU has no room for an array. The process can go on: after dropping the arrays that were being made and "
        "`mx.clear_cache()`, it works as before.",
        (
            "Free what is left over and try something smaller: `del outputs; mx.clear_cache()`.",
            *_NEED_LESS,
            "See who else holds the GPU: `nvidia-smi`.",
        ),
        (MLX + "issues/2821", MLX + "pull/2869"),
    ),
    KnownError(
        "An array larger than one buffer may be",
        r"\[metal::malloc\] Attempting to allocate \d+ bytes which is greater than",
        "[metal::malloc] Attempting to allocate 90000000000 bytes which is greater than the maximum allowed buffer "
        "size of 86586540032 bytes.",
        "A single array needs more than Metal gives to one buffer (`max_buffer_length` in `mx.device_info()`), however "
        "much memory is free. Usually it is a tensor that grows with the square of the sequence length or with "
        "batch x length x vocabulary.",
        (
            "Split the work: a shorter sequence, a smaller batch, or the loss computed in chunks of the sequence.",
            "Attention scores: use `mx.fast.scaled_dot_product_attention`, which never makes them.",
        ),
        (MLX + "blob/main/mlx/backend/metal/allocator.cpp",),
    ),
    KnownError(
        "Allocation failed",
        r"\[malloc(_or_wait)?\] Unable to allocate|std::bad_alloc",
        "[malloc] Unable to allocate 9663676416 bytes.",
        "The system refused the memory. On the CPU backend an allocation that fails may also end the process without "
        "any error, and one that the system promises but cannot keep meets the kernel's out-of-memory killer.",
        (*_NEED_LESS, "See what else holds memory: `mlx-tune doctor --only processes`."),
        (MLX + "issues/63",),
    ),
    KnownError(
        "Too many buffers",
        r"\[metal::malloc\] Resource limit \(\d+\) exceeded",
        "[metal::malloc] Resource limit (499000) exceeded.",
        "More than 499,000 Metal buffers are alive. It is about their number, not their size: many small arrays that "
        "are kept, a graph that grows because nothing evaluates it, a compile cache with a trace for each shape "
        "(mlx#4464), or small buffers in MLX's cache.",
        (
            "Evaluate every step: `mx.eval(model.parameters(), optimizer.state)`, and never keep a loss that was not "
            "turned into a number: `losses.append(loss.item())`.",
            "Release cached buffers now and then: `mx.clear_cache()`.",
            "Pad to a few lengths, so that compiled functions meet few shapes.",
        ),
        (MLX + "issues/1712", MLX + "issues/3849", MLX + "issues/4464"),
    ),
    KnownError(
        "A wired limit that is too high",
        r"\[metal::set_wired_limit\]|set_wired_limit.*(larger|greater) than",
        "[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size is not allowed.",
        "The limit is above `max_recommended_working_set_size`, which MLX reads once per process.",
        (
            "Use `with mt.wired_limit(model): ...`, which never asks for more than this machine allows.",
            "After raising `iogpu.wired_limit_mb`, start Python again.",
        ),
        (MLX + "blob/main/mlx/backend/metal/allocator.cpp", MLX + "issues/3186"),
    ),
)
