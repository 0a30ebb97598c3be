"""The table of MLX's errors: what each means, and what to do about it. The troubleshooting page is made from it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MLX = "https://github.com/ml-explore/mlx/"


@dataclass(frozen=True)
class Entry:
    """One error, or one family of them.

    Attributes:
        name: A short one, as a heading.
        pattern: A regular expression, tried anywhere in the error's text.
        example: A text that MLX really gives.
        meaning: What has happened.
        remedies: What to do, the most likely help first.
        sources: The upstream issues or source files that it rests on.
    """

    name: str
    pattern: str
    example: str
    meaning: str
    remedies: tuple[str, ...]
    sources: tuple[str, ...]

    def matches(self, text: str) -> bool:
        """Whether the text is one of these errors."""
        return re.search(self.pattern, text, re.IGNORECASE) is not None


_NEED_LESS = (
    "Find the largest batch that fits before training: `mt.autobatch(step, make_batch, state=(model, optimizer))`.",
    "Recompute activations instead of keeping them: `mt.checkpoint_blocks(model)`.",
    "Quantize the model: `mt.quantize_model(model, 4)`.",
)

ENTRIES: tuple[Entry, ...] = (
    Entry(
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
        (_MLX + "pull/479", _MLX + "issues/3979", _MLX + "issues/4134", _MLX + "issues/4174"),
    ),
    Entry(
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
        (_MLX + "issues/2821", _MLX + "pull/2869"),
    ),
    Entry(
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
        (_MLX + "blob/main/mlx/backend/metal/allocator.cpp",),
    ),
    Entry(
        "Allocation failed",
        r"\[malloc(_or_wait)?\] Unable to allocate|std::bad_alloc",
        "[malloc] Unable to allocate 9663676416 bytes.",
        "The system refused the memory. On the CPU backend an allocation that fails may also end the process without "
        "any error, and one that the system promises but cannot keep meets the kernel's out-of-memory killer.",
        (*_NEED_LESS, "See what else holds memory: `mlx-tune doctor --only processes`."),
        (_MLX + "issues/63",),
    ),
    Entry(
        "The GPU watchdog",
        r"kIOGPUCommandBufferCallbackErrorImpactingInteractivity|Impacting Interactivity"
        r"|kIOGPUCommandBufferCallbackErrorTimeout|Caused GPU Timeout",
        "[METAL] Command buffer execution failed: Impacting Interactivity "
        "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
        "macOS ended work that kept the GPU from drawing the screen for too long. Memory is not the trouble: one "
        "command buffer took too much time, which long prompts and large convolutions do.",
        (
            "Let the display sleep: the watchdog protects a screen that is in use, and this is what helped everybody.",
            "Ask for less at once: a smaller `--prefill-step-size`, a smaller batch, `mx.eval` between its parts.",
            "Put less into a command buffer: `MLX_MAX_OPS_PER_BUFFER=10 MLX_MAX_MB_PER_BUFFER=10` in the environment. "
            "It does not help where a single operation takes too long.",
            "On macOS 26 some report that `AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1` in the environment helps, at the price of "
            "a screen that stutters.",
        ),
        (_MLX + "issues/3267",),
    ),
    Entry(
        "The GPU ignores what is submitted",
        r"kIOGPUCommandBufferCallbackErrorSubmissionsIgnored|Ignored \(for causing prior/excessive GPU errors\)"
        r"|kIOGPUCommandBufferCallbackErrorInnocentVictim|Innocent Victim|kIOGPUCommandBufferCallbackErrorHang",
        "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) "
        "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
        "An earlier piece of work failed, of this process or of a neighbour, and the driver refuses more. What counts "
        "is the first error, which may have been printed long before.",
        (
            "Start the process again, and look for the first error of the run.",
            "If it returns at once, restart the Mac.",
        ),
        (_MLX + "issues/4174",),
    ),
    Entry(
        "The Mac panics",
        r"completeMemory\(\) prepare count underflow|IOGPU(Group)?Memory\.cpp",
        'panic(cpu 9 caller 0xfffffe0044): "completeMemory() prepare count underflow" @IOGPUMemory.cpp:550',
        "macOS's GPU driver lost count of memory and took the whole machine down. It is a fault of macOS that MLX can "
        "bring about: long prompts, batches of many requests, buffers that are made and released all the time, above "
        "all while memory is wired.",
        (
            "Wire nothing: `MLX_TUNE_NO_WIRING=1` in the environment (mlx-lm wires on its own, without a switch).",
            "Leave slack: a smaller batch or prompt, no tight `mt.memory_limit` around wired memory.",
            "Update macOS, and report the panic to Apple: the thread names the report to refer to.",
        ),
        (_MLX + "issues/3186", _MLX + "issues/3346"),
    ),
    Entry(
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
        (_MLX + "issues/1712", _MLX + "issues/3849", _MLX + "issues/4464"),
    ),
    Entry(
        "A stream of another thread",
        r"There is no Stream\((gpu|cpu), \d+\) in current thread",
        "There is no Stream(gpu, 0) in current thread.",
        "Since MLX 0.31.2 a stream belongs to the thread that made it. Something made in one thread (a stream held in "
        "a module, a model or cache that is not evaluated yet) is used in another, as web servers and thread pools do.",
        (
            "Load and run the model in the same thread, or evaluate what crosses over first: "
            "`mx.eval(model.parameters())`.",
            "Make a stream in the thread that uses it: `with mx.stream(mx.new_stream(mx.default_device())): ...`.",
            "For mlx-lm's server, update: `uv pip install -U mlx-lm`.",
        ),
        (_MLX + "issues/3727", "https://github.com/ml-explore/mlx-lm/issues/1181"),
    ),
    Entry(
        "The Metal library does not load",
        r"Failed to load the (default )?metallib|Can not load metallib",
        "Failed to load the default metallib. This library is using language version 4.0 which is not supported on "
        "this OS. library not found library not found library not found",
        "MLX's compiled kernels (`mlx.metallib`) are missing, or made for a newer macOS than this one: an app that "
        "was built on a newer system, or an environment that was copied from one, carries the wrong file.",
        (
            "uv pip install --force-reinstall mlx mlx-metal   # takes the wheel for this macOS",
            "In an app bundle, put `mlx.metallib` beside `libmlx.dylib`.",
        ),
        ("https://github.com/exo-explore/exo/issues/1327", _MLX + "blob/main/mlx/backend/metal/device.cpp"),
    ),
    Entry(
        "A Metal kernel that cannot be loaded or built",
        r"\[metal::Device\] Unable to (load (kernel|function)|build metal library)",
        "[metal::Device] Unable to build metal library from source\nerror: invalid value 'metal3.1' in '-std=metal3.1'",
        "Metal refuses a kernel: macOS is older than MLX needs, the library beside it is of another version, or one of "
        "your own (`mx.fast.metal_kernel`) does not compile. The compiler's words follow in the error.",
        (
            "uv pip install --force-reinstall mlx mlx-metal   # so that the library and MLX are of one version",
            "Update macOS: MLX needs 14, some kernels need later ones.",
        ),
        ("https://github.com/ml-explore/mlx-examples/issues/1102", _MLX + "blob/main/mlx/backend/metal/device.cpp"),
    ),
    Entry(
        "No Metal device",
        r"\[metal::load_device\] No Metal device available|index 0 beyond bounds for empty (NS)?array",
        "[metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, or virtualized "
        "macOS sessions where the GPU is not accessible.",
        "macOS gives this session no GPU: a sandbox (an editor's or an agent's), a virtual machine without a "
        "paravirtual GPU, a daemon. Before MLX 0.32 the process dies with an NSRangeException at import.",
        (
            "Run outside the sandbox, in a terminal of a logged-in user.",
            "Where a GPU is not needed: `mx.set_default_device(mx.cpu)` as the first thing after the import.",
        ),
        (_MLX + "issues/3397", _MLX + "issues/3148", _MLX + "pull/3428"),
    ),
    Entry(
        "MLX without a backend",
        r"libmlx\.(so|dylib): cannot open shared object file|Library not loaded: @rpath/libmlx",
        "ImportError: libmlx.so: cannot open shared object file: No such file or directory",
        "The package `mlx` is there, the one with the library is not: on Linux `pip install mlx` does not bring it.",
        # Where the library was taken away later, what is installed counts as complete: hence the force.
        ("uv pip install --force-reinstall 'mlx[cpu]'   # or mlx[cuda12], mlx[cuda13] with an NVIDIA GPU",),
        (_MLX + "issues/2390", _MLX + "issues/2402"),
    ),
    Entry(
        "NVIDIA's libraries are missing",
        r"lib(nccl|cudnn|cublas|cublasLt|cudart|cufft|cusolver|nvrtc)[\w-]*\.so[\d.]*: cannot open",
        "ImportError: libnccl.so.2: cannot open shared object file: No such file or directory",
        "The CUDA backend is installed without the packages that bring NVIDIA's libraries, or on a machine that is "
        "meant to compute on its processor.",
        (
            "uv pip install --force-reinstall 'mlx[cuda12]'   # or mlx[cuda13]; without an NVIDIA GPU mlx[cpu]",
            "Of two backends that are installed, the last one is in force: `mlx-tune doctor --only one-backend`.",
        ),
        (_MLX + "issues/2500", "https://ml-explore.github.io/mlx/build/html/install.html"),
    ),
    Entry(
        "Another mlx_tune is in the way",
        r"cannot import name '\w+' from 'mlx_tune'|module 'mlx_tune' has no attribute",
        "AttributeError: module 'mlx_tune' has no attribute 'wired_limit'",
        "The package that was imported is not this library: the distribution `mlx-tune` is an unrelated trainer whose "
        "package has the same name, and the one that was installed last has overwritten the other.",
        (
            "uv pip uninstall mlx-tune && uv pip install --force-reinstall mlx-tune-kit",
            "If only one name is missing, this library is older than what you read: `uv pip install -U mlx-tune-kit`.",
        ),
        ("https://pypi.org/project/mlx-tune",),
    ),
    Entry(
        "Another mlx is in the way",
        r"No module named 'mlx\.core'|'mlx' is not a package",
        "ModuleNotFoundError: No module named 'mlx.core'; 'mlx' is not a package",
        "A file `mlx.py` or a folder `mlx` of your own, beside the script, is imported instead of MLX.",
        ("Rename it; `python -c 'import mlx; print(mlx.__path__)'` says which it is.",),
        ("https://docs.python.org/3/tutorial/modules.html#the-module-search-path",),
    ),
    Entry(
        "MLX and its backend do not match",
        r"undefined symbol: \S*mlx|Symbol not found: \S*mlx|core\..*\.so: undefined symbol",
        "ImportError: mlx/core.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3mlx4core9cumulativeE",
        "`mlx` and the distribution with its library (`mlx-cpu`, `mlx-cuda-12`, `mlx-metal`) are of different "
        "versions, or another `libmlx` (Homebrew's) is found first. `pip check` does not notice.",
        (
            "uv pip install --force-reinstall 'mlx[cpu]'   # or the extra that you use, so that both match",
            "brew uninstall mlx   # on a Mac where the error names Homebrew's libmlx",
        ),
        ("https://github.com/Acelogic/LTX-2-MLX/issues/16", _MLX + "issues/2402"),
    ),
    Entry(
        "glibc is too old",
        r"version `GLIBC(XX)?_[\d.]+' not found",
        "ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.35' not found (required by libmlx.so)",
        "The wheels are made for glibc 2.35 or later.",
        ("Use a newer distribution (Ubuntu 22.04, Debian 12), also as a container image.",),
        ("https://ml-explore.github.io/mlx/build/html/install.html",),
    ),
    Entry(
        "The CUDA driver is missing or too old",
        r"libcuda\.so\.1: cannot open|CUDA driver version is insufficient|cudaErrorInsufficientDriver"
        r"|no kernel image is available|unsupported toolchain|no CUDA-capable device",
        "cudaGetDeviceCount failed: CUDA driver version is insufficient for CUDA runtime version",
        "The backend needs an NVIDIA driver of at least 550.54.14 (cuda12) or 580 (cuda13), and a GPU of compute "
        "capability 7.5 or higher.",
        (
            "Update the driver, or take the other extra: `uv pip install 'mlx[cuda12]'`.",
            "See that `CUDA_VISIBLE_DEVICES` does not hide the GPU: `unset CUDA_VISIBLE_DEVICES`.",
            "Without a GPU: `uv pip install 'mlx[cpu]'`.",
        ),
        ("https://ml-explore.github.io/mlx/build/html/install.html",),
    ),
    Entry(
        "A function that cannot be exported",
        r"\[export_function\] Unable to (get state for|serialize) primitive (?P<primitive>\w+)",
        "[export_function] Unable to get state for primitive CustomTransforms",
        "`mx.export_function` cannot write this operation down. `CustomTransforms` is what `mx.checkpoint` and "
        "`mx.custom_function` make; on GPUs the fused cross entropy and attention's backward pass refuse too.",
        (
            "Export the function without checkpointing: `mt.uncheckpoint(model)` first, `mt.checkpoint_blocks(model)` "
            "after.",
            "To learn a step's memory, ask `mt.estimate_memory(step, ...)`, which knows how to trace such steps.",
        ),
        (_MLX + "issues/2747", _MLX + "issues/2851", _MLX + "blob/main/mlx/export.cpp"),
    ),
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
        (_MLX + "issues/1033",),
    ),
    Entry(
        "A gradient through whole numbers",
        r"Cannot calculate VJP with respect to (indices|mask|boolean masks)|\[Primitive::vjp\] Not implemented for",
        "[gather] Cannot calculate VJP with respect to indices.",
        "A gradient is asked for something that has none: token ids, masks or random keys, passed as an argument of a "
        "function that is differentiated or checkpointed.",
        (
            "Use `mt.checkpoint`, which stops the gradients of such arguments; `mx.checkpoint` does not.",
            "Or wrap the argument: `mx.stop_gradient(ids)`.",
        ),
        (_MLX + "blob/main/mlx/primitives.cpp",),
    ),
    Entry(
        "Evaluating inside a transformation",
        r"\[eval\] Attempting to eval an array (during function|without a primitive)",
        "[eval] Attempting to eval an array during function transformations like compile or vmap is not allowed.",
        "Something inside a compiled or transformed function asks for a value: `.item()`, `print`, `if` on an array, "
        "NumPy, or a state that the compiled function changes without declaring it.",
        (
            "Move what needs the value out of the function.",
            "Declare state that changes: `mx.compile(step, inputs=state, outputs=state)` with "
            "`state = [model.state, optimizer.state, mx.random.state]`.",
        ),
        (_MLX + "issues/1083",),
    ),
    Entry(
        "A compiled function that captures its own input",
        r"\[compile\] Attempting to compile a function with uncaptured inputs",
        "[compile] Attempting to compile a function with uncaptured inputs is not allowed.",
        "An array that goes into the compiled function as an argument or as declared state is used in it directly too, "
        "captured from outside. The one is a placeholder while the function is traced, the other is not.",
        (
            "Use the argument inside the function, not the variable outside: `mx.compile(lambda a: a + x)(x)` fails.",
            "For a model, let the function reach it through what is declared: `mx.compile(step, inputs=state, "
            "outputs=state)` with `state = [model.state, optimizer.state, mx.random.state]`.",
        ),
        (_MLX + "pull/1401", _MLX + "blob/main/mlx/compile.cpp"),
    ),
    Entry(
        "bfloat16 to NumPy",
        r"PEP 3118 buffer format string",
        "'bfloat16' is not a valid PEP 3118 buffer format string",
        "NumPy has no bfloat16, so `np.array(x)` of such an array fails.",
        ("Convert first: `np.array(x.astype(mx.float32))`.",),
        (_MLX + "issues/3974",),
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
        (_MLX + "issues/1238", _MLX + "issues/1258", _MLX + "blob/main/mlx/linalg.cpp"),
    ),
    Entry(
        "Quantized input on the CPU",
        r"\[(QQMatmul|GatherQQMM)\] NYI",
        "[QQMatmul] NYI",
        "Multiplying quantized activations (`quantize_input=True`, modes nvfp4 and mxfp8) is not written for the CPU.",
        ("Quantize weights only there: `mt.quantize_model(model, 4)` without `activations=True`.",),
        (_MLX + "blob/main/mlx/backend/cpu/quantized.cpp",),
    ),
    Entry(
        "A wired limit that is too high",
        r"\[metal::set_wired_limit\]|set_wired_limit.*(larger|greater) than",
        "[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size is not allowed.",
        "The limit is above `max_recommended_working_set_size`, which MLX reads once per process.",
        (
            "Use `with mt.wired_limit(model): ...`, which never asks for more than this machine allows.",
            "After raising `iogpu.wired_limit_mb`, start Python again.",
        ),
        (_MLX + "blob/main/mlx/backend/metal/allocator.cpp", _MLX + "issues/3186"),
    ),
)


def find(text: str) -> Entry | None:
    """The first entry that matches a text; None where none does."""
    return next((entry for entry in ENTRIES if entry.matches(text)), None)
