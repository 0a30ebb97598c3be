"""Errors of Metal and of macOS's GPU driver."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.entry import MLX, Entry

ENTRIES: tuple[Entry, ...] = (
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
        (MLX + "issues/3267",),
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
        (MLX + "issues/4174",),
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
        (MLX + "issues/3186", MLX + "issues/3346"),
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
        ("https://github.com/exo-explore/exo/issues/1327", MLX + "blob/main/mlx/backend/metal/device.cpp"),
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
        ("https://github.com/ml-explore/mlx-examples/issues/1102", MLX + "blob/main/mlx/backend/metal/device.cpp"),
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
        (MLX + "issues/3397", MLX + "issues/3148", MLX + "pull/3428"),
    ),
)
