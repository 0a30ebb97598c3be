"""Errors of Metal and of macOS's GPU driver."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX, MLX_EXAMPLES, MLX_VLM, KnownError

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
        "The GPU watchdog",
        r"kIOGPUCommandBufferCallbackErrorImpactingInteractivity|Impacting Interactivity",
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
        (MLX + "issues/3267",),
    ),
    KnownError(
        "GPU work that took too long",
        r"Internal Error \(0000000e:Internal Error|kIOGPUCommandBufferCallbackErrorTimeout|Caused GPU Timeout",
        "[METAL] Command buffer execution failed: Internal Error (0000000e:Internal Error)",
        "A command buffer did not end within the few seconds that macOS allows. Single operations were too "
        "large for it, several processes shared the GPU, a rank waited for another machine, or macOS moved "
        "memory of a model that barely fits. Memory need not be full, and checkpointing, which adds work, does "
        "not help against long operations.",
        (
            "Ask for less at once: a smaller batch, shorter sequences, a smaller `--prefill-step-size`.",
            "Leave the GPU to one process.",
            "Between machines, let the processor wait: `mx.distributed.all_sum(x, stream=mx.cpu)`.",
            "If the machine swaps meanwhile (`mlx-tune doctor --only swap`), take less memory: a smaller or quantized "
            "model.",
        ),
        (
            MLX + "issues/1231",
            MLX + "issues/1335",
            MLX_EXAMPLES + "issues/1185",
            MLX_EXAMPLES + "issues/664",
        ),
    ),
    KnownError(
        "The GPU in the background of a phone",
        r"BackgroundExecutionNotPermitted|Insufficient Permission \(to submit GPU work from background\)",
        "[METAL] Command buffer execution failed: Insufficient Permission (to submit GPU work from background) "
        "(00000006:kIOGPUCommandBufferCallbackErrorBackgroundExecutionNotPermitted)",
        "iOS and iPadOS do not let an app use the GPU in the background, unless it has asked for a long task "
        "with the GPU (from iOS 26). The error comes on a thread of Metal, so the app cannot catch it.",
        (
            "Stop generating before the app goes to the background, and go on after.",
            "From iOS 26, ask for a background task with GPU resources (`BGContinuedProcessingTaskRequest`).",
        ),
        ("https://github.com/ml-explore/mlx-swift/issues/274", "https://github.com/mlalma/kokoro-ios/issues/18"),
    ),
    KnownError(
        "The GPU touched memory that is not there",
        r"Invalid Resource \(00000009|kIOGPUCommandBufferCallbackErrorInvalidResource"
        r"|GPU Address Fault|kIOGPUCommandBufferCallbackErrorPageFault",
        "[METAL] Command buffer execution failed: Invalid Resource "
        "(00000009:kIOGPUCommandBufferCallbackErrorInvalidResource)",
        "A kernel used a buffer that was gone, or read or wrote beyond one. It is a fault of the kernel, one of"
        " your own or one of MLX, or it follows from memory that ran out before.",
        (
            "uv pip install -U mlx mlx-lm mlx-vlm",
            "In a kernel of your own, see that every index is below the array's size, and try it on small arrays.",
            "If it comes only when memory is nearly full, take less: `mt.memory_budget()` says how much is free.",
        ),
        (MLX_VLM + "issues/270", MLX + "issues/3224"),
    ),
    KnownError(
        "The GPU ignores what is submitted",
        r"kIOGPUCommandBufferCallbackErrorSubmissionsIgnored|Ignored \(for causing prior/excessive GPU errors\)"
        r"|kIOGPUCommandBufferCallbackErrorInnocentVictim|Innocent Victim|victim of GPU error"
        r"|kIOGPUCommandBufferCallbackErrorHang",
        "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) "
        "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
        "An earlier piece of work failed, of this process or of a neighbour, and the driver refuses more. The first "
        "error counts, which may have been printed long before.",
        (
            "Start the process again, and look for the first error of the run.",
            "If it returns at once, restart the Mac.",
        ),
        (MLX + "issues/4174",),
    ),
    KnownError(
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
        (MLX + "issues/3186", MLX + "issues/3346"),
    ),
    KnownError(
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
        ("https://github.com/exo-explore/exo/issues/1327", MLX + "blob/main/mlx/backend/metal/device.cpp"),
    ),
    KnownError(
        "A Metal kernel that cannot be loaded or built",
        r"\[metal::Device\] Unable to (load (kernel|function)|build metal library)",
        "[metal::Device] Unable to build metal library from source\nerror: invalid value 'metal3.1' in '-std=metal3.1'",
        "Metal refuses a kernel: macOS is older than MLX needs, the library beside it is of another version, or one of "
        "your own (`mx.fast.metal_kernel`) does not compile. The compiler's words follow in the error.",
        (
            "uv pip install --force-reinstall mlx mlx-metal   # so that the library and MLX are of one version",
            "Update macOS: MLX needs 14, some kernels need later ones.",
        ),
        ("https://github.com/ml-explore/mlx-examples/issues/1102", MLX + "blob/main/mlx/backend/metal/device.cpp"),
    ),
    KnownError(
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
        (MLX + "issues/3397", MLX + "issues/3148", MLX + "pull/3428"),
    ),
    KnownError(
        "A custom kernel without its GPU",
        r"\[(metal_kernel|custom_kernel)\] (No Metal back-end|Only supports the GPU)|\[cuda_kernel\] No CUDA back-end",
        "RuntimeError: [cuda_kernel] No CUDA back-end.",
        "The model calls a kernel that is written for another GPU than this machine's, or for a GPU at all while the "
        "default device is the processor.",
        (
            "Run on the machine that it is written for: `mx.set_default_device(mx.gpu)` where there is one.",
            "Elsewhere use the library's way around it; mlx-lm's models have one: `uv pip install -U mlx-lm`.",
        ),
        (MLX + "blob/main/mlx/backend/cuda/no_cuda.cpp", MLX + "blob/main/mlx/backend/metal/custom_kernel.cpp"),
    ),
)
