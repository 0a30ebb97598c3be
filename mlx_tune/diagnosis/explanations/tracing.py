"""Errors of functions that are traced, and of threads."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX, KnownError

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
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
        (MLX + "issues/1083",),
    ),
    KnownError(
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
        (MLX + "pull/1401", MLX + "blob/main/mlx/compile.cpp"),
    ),
    KnownError(
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
        (MLX + "issues/2747", MLX + "issues/2851", MLX + "blob/main/mlx/export.cpp"),
    ),
    KnownError(
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
        (MLX + "issues/3727", "https://github.com/ml-explore/mlx-lm/issues/1181"),
    ),
    KnownError(
        "A compiled function that lost an array",
        r"_Map_base::at|unordered_map::at",
        "IndexError: _Map_base::at",
        "While compiling, MLX did not find an array of the graph again. It is a fault in `mx.compile`, seen "
        "with state that blocks write (running statistics, counters) inside checkpointing, and in versions "
        "before 0.30.1. Arrays that the failed trace has left in the model can no longer be evaluated.",
        (
            "Make or load the model anew; then see whether it is compilation: `mx.disable_compile()` before the"
            " first step.",
            "uv pip install -U mlx mlx-tune-kit",
            "Leave blocks that write state (`nn.BatchNorm` in training) without checkpointing, or the step uncompiled.",
            "Declare all state that changes: `mx.compile(step, inputs=state, outputs=state)` with "
            "`state = [model.state, optimizer.state, mx.random.state]`.",
        ),
        (MLX + "issues/2864", MLX + "issues/815"),
    ),
    KnownError(
        "A graph that is never evaluated",
        r"Graph depth exceeded maximum allowed limit",
        "RuntimeError: [eval] Graph depth exceeded maximum allowed limit. Try evaluating the graph more frequently.",
        "Something has grown from step to step without being evaluated: a running sum, an average of weights, a"
        " state that `mx.eval` is not given.",
        (
            "Evaluate everything that lives on, each step: `mx.eval(model.parameters(), optimizer.state, average)`.",
            "Keep numbers, not arrays, of what is only reported: `total += loss.item()`.",
        ),
        (MLX + "issues/810",),
    ),
    KnownError(
        "A compiled kernel with too many arrays",
        r"\[compile\] Too many inputs/outputs fused in the Metal Compiled primitive",
        "[compile] Too many inputs/outputs fused in the Metal Compiled primitive which exhausted the available "
        "argument buffers for the kernel.",
        "Metal gives a kernel 31 buffers, and the compiler joined operations that need more. Derivatives of "
        "derivatives make such graphs.",
        (
            "uv pip install -U mlx   # later versions of the compiler stop before",
            "Compile smaller functions, or none: `mx.disable_compile()`.",
        ),
        (MLX + "issues/1880", MLX + "pull/1887"),
    ),
    KnownError(
        "An abort after a thread has ended",
        r"terminate called without an active exception",
        "terminate called without an active exception",
        "The process ended while one of its threads was still at work. In a program that uses MLX: a Python thread "
        "drew random numbers (`mx.random.*` without a key, dropout, or a look at `mx.random.state`), and the process "
        "exited before the system's thread was gone. MLX gives that thread's random stream back last of all, and needs "
        "Python's lock for it. The work itself was finished.",
        (
            "Call `mx.clear_streams()` as the last thing that the thread does.",
            "Draw with keys in threads: `mx.random.uniform(key=key)` leaves the thread's stream alone.",
        ),
        (MLX + "blob/main/python/src/random.cpp", MLX + "blob/main/python/tests/test_threads.py"),
    ),
)
