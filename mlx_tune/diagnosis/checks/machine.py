"""Checks of the machine: memory, swap, containers, wiring, neighbours, disk, and the environment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_tune import devices
from mlx_tune.devices import CgroupMemory
from mlx_tune.diagnosis.check import Finding, check, failed, passed, skipped, warned
from mlx_tune.diagnosis.checks import readings
from mlx_tune.diagnosis.checks.readings import Neighbour
from mlx_tune.files.scratch import free_bytes
from mlx_tune.units import format_bytes
from mlx_tune.wiring.ledger import Share, ledger
from mlx_tune.wiring.limits import reserve_bytes

THEME = "machine"
GB = 10**9


@check(
    "memory",
    THEME,
    remedies={"close": "Close what you do not need; `mlx-tune doctor --only processes` says who holds most."},
)
def memory(total: int | None = None, available: int | None = None) -> Finding:
    """Enough memory is free to work with.

    Weights, activations and the system share one memory on a Mac. Memory that others hold is missing; an MLX process
    that needs more makes the whole machine swap, which looks like a very slow model.
    """
    total = devices.ram_bytes() if total is None else total
    available = readings.available_bytes() if available is None else available
    text = f"{format_bytes(available)} of {format_bytes(total)} are free"
    figures = {"total_bytes": total, "available_bytes": available}
    if available < 0.1 * total or available < GB:
        return warned(text, "close", figures=figures)
    return passed(text, figures=figures)


@check("swap", THEME, remedies={"restart": "Close what holds memory, or restart: swap is given back slowly."})
def swap(used: int | None = None, total: int | None = None, pressure: int | None = None) -> Finding:
    """The machine is not swapping.

    A model that is larger than what is free pushes something to the disk, and every token then waits for the disk.
    macOS calls it memory pressure: normal, warning, critical.
    """
    used = devices.swap_used_bytes() if used is None else used
    total = devices.ram_bytes() if total is None else total
    if pressure is None:
        pressure = devices.sysctl("kern.memorystatus_vm_pressure_level")
    words = {1: "normal", 2: "warning", 4: "critical"}
    text = f"{format_bytes(used)} of swap in use"
    if pressure is not None:
        text += f", memory pressure {words.get(pressure, pressure)}"
    figures = {"swap_used_bytes": used, "pressure_level": pressure}
    if (pressure or 1) > 1 or used > total / 4:
        return warned(text, "restart", figures=figures)
    return passed(text, figures=figures)


@check(
    "container",
    THEME,
    remedies={
        "limit": 'with mt.memory_limit("{budget}"): ...   # MLX reads the RAM of the host, not the container\'s limit',
    },
)
def container(groups: Sequence[CgroupMemory] | None = None, host: int | None = None) -> Finding:
    """A container's memory limit is one that MLX knows of.

    MLX on the CPU takes its default limit, 0.8 of RAM, from the host. In a container that may hold less, the kernel
    kills the process before MLX thinks that memory is short. `mt.memory_budget()` reads the container's limit.
    """
    groups = devices.cgroup_memory() if groups is None else groups
    if not groups:
        return skipped("no control group limits memory here")
    host = readings.host_ram_bytes() if host is None else host
    tightest = min(groups, key=lambda group: group.limit_bytes - group.used_bytes)
    free = max(0, tightest.limit_bytes - tightest.used_bytes)
    figures = {"limit_bytes": tightest.limit_bytes, "used_bytes": tightest.used_bytes, "host_bytes": host}
    text = f"the container may hold {format_bytes(tightest.limit_bytes)}, {format_bytes(free)} of it are free"
    if tightest.limit_bytes < 0.8 * host:
        budget = format_bytes(0.9 * tightest.limit_bytes).replace(" ", "")
        return warned(
            f"{text}; MLX's own limit is 0.8 of {format_bytes(host)}", "limit", {"budget": budget}, figures=figures
        )
    return passed(text, figures=figures)


@check(
    "working-set",
    THEME,
    remedies={
        "lower": "sudo sysctl iogpu.wired_limit_mb={megabytes}   # leaves the system {reserve}; 0 is the default",
    },
    in_child=True,
)
def working_set(recommended: int | None = None, wired_limit_mb: int | None = None, ram: int | None = None) -> Finding:
    """The GPU's share of memory leaves the system enough.

    Metal recommends not to use more than about three quarters of RAM; `iogpu.wired_limit_mb` moves that. Set too
    high, a large model can freeze the Mac. MLX reads it once, so that Python has to be started again after a change.
    """
    if recommended is None:
        try:
            info = devices.metal_info()
        except RuntimeError:
            return skipped("Metal gives this session no device: see gpu-present")
        if info is None:
            return skipped("only Metal has a recommended working set")
        recommended, ram = int(info["max_recommended_working_set_size"]), int(info["memory_size"])
        wired_limit_mb = devices.sysctl("iogpu.wired_limit_mb")
    ram = ram or devices.ram_bytes()
    text = f"Metal recommends at most {format_bytes(recommended)} of {format_bytes(ram)}"
    text += f", iogpu.wired_limit_mb={wired_limit_mb}" if wired_limit_mb else ", iogpu.wired_limit_mb is the default"
    figures = {"recommended_bytes": recommended, "wired_limit_mb": wired_limit_mb, "memory_bytes": ram}
    reserve = reserve_bytes(ram)
    if wired_limit_mb and wired_limit_mb * 2**20 > ram - reserve:
        left = format_bytes(max(0, ram - wired_limit_mb * 2**20))
        values = {"megabytes": (ram - reserve) // 2**20, "reserve": format_bytes(reserve)}
        return warned(f"{text}: that leaves the system {left}", "lower", values, figures=figures)
    return passed(text, figures=figures)


@check(
    "processes",
    THEME,
    remedies={"look": "See whether they are still needed: {names}."},
)
def processes(neighbours: Sequence[Neighbour] | None = None, total: int | None = None) -> Finding:
    """No other process holds much of the memory, or the GPU.

    A second training run, a model server that was left running or a browser can hold half of a Mac.
    """
    neighbours = readings.neighbours() if neighbours is None else neighbours
    total = devices.ram_bytes() if total is None else total
    large = [one for one in neighbours if one.bytes > total / 8 or one.on_gpu]
    named = ", ".join(
        f"{one.name} ({one.pid}) {format_bytes(one.bytes)}{' on the GPU' if one.on_gpu else ''}" for one in large
    )
    figures = {"processes": [{"pid": one.pid, "bytes": one.bytes, "on_gpu": one.on_gpu} for one in large]}
    held = sum(one.bytes for one in large if not one.on_gpu)
    if held > total / 4 or any(one.on_gpu for one in large):
        return warned(
            f"others hold much: {named}", "look", {"names": ", ".join(one.name for one in large)}, figures=figures
        )
    return passed(f"nobody else holds much{': ' + named if named else ''}", figures=figures)


@check(
    "wired-shares",
    THEME,
    remedies={"look": "See whether they are still needed: {pids}."},
)
def wired_shares(shares: Sequence[Share] | None = None, ram: int | None = None) -> Finding:
    """Processes that share what may be wired leave some of it.

    Those that wire memory with `mlx_tune.wired_limit(share=True)` enter how much in a folder of the user's, so that
    their sum stays below what the machine may wire. Other programs that wire are not in it.
    """
    ram = devices.ram_bytes() if ram is None else ram
    try:
        shares = ledger.others() if shares is None else shares
    except OSError as error:
        return skipped(f"the folder in which processes enter what they wire cannot be read: {error}")
    if not shares:
        return passed("no process has entered that it wires memory")
    named = ", ".join(f"process {share.pid} {format_bytes(share.wired_bytes)}" for share in shares)
    figures = {"shares": [{"pid": share.pid, "wired_bytes": share.wired_bytes} for share in shares]}
    if sum(share.wired_bytes for share in shares) > (ram - reserve_bytes(ram)) / 2:
        pids = {"pids": ", ".join(str(share.pid) for share in shares)}
        return warned(f"wired by processes that share: {named}", "look", pids, figures=figures)
    return passed(f"wired by processes that share: {named}", figures=figures)


@check(
    "disk",
    THEME,
    remedies={"free": "Free some space, or move the models: `export HF_HOME=/another/disk/huggingface`"},
)
def disk(free: Mapping[str, int] | None = None) -> Finding:
    """There is room for models, adapters and swap.

    Looks at the current folder, the folder of temporary files and Hugging Face's cache. A 7B model takes 15 GB in
    16 bits and 4 in 4 bits; converting one needs room for both.
    """
    if free is None:
        free = {name: free_bytes(path) for name, path in _folders().items()}
    least = min(free, key=lambda name: free[name])
    text = f"{format_bytes(free[least])} free for {least}"
    figures = {"free_bytes": dict(free)}
    if free[least] < GB:
        return failed(text, "free", figures=figures)
    return warned(text, "free", figures=figures) if free[least] < 10 * GB else passed(text, figures=figures)


def _folders() -> dict[str, Path]:
    cache = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return {"this folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "models": Path(cache)}


#: Environment variables that change how MLX uses memory or time, and how.
VARIABLES = {
    "MLX_MAX_OPS_PER_BUFFER": "how many operations go into a command buffer: fewer lower the peak and cost time",
    "MLX_MAX_MB_PER_BUFFER": "how much memory a command buffer may touch: less lowers the peak and costs time",
    "MLX_BFS_MAX_WIDTH": "the order of evaluation, and with it the peak",
    "MLX_CONV_WINOGRAD_WORKING_SET": "how much memory a convolution takes beside its arrays",
    "MLX_CONV_WINOGRAD_TILE_BATCH": "how much memory a convolution takes beside its arrays",
    "MLX_CONV_UNFOLD_TILE_ROWS": "how much memory a convolution takes beside its arrays",
    "MLX_RESIDENCY_SET_MAX_PCT": "how wired memory is divided into sets",
    "MLX_METAL_FAST_SYNCH": "how the GPU is waited for",
    "MLX_ENABLE_TF32": "the precision of float32 matmul on GPUs",
    "MLX_DISABLE_COMPILE": "mx.compile does nothing: more memory, less speed",
    "MLX_USE_CUDA_GRAPHS": "whether CUDA work is sent as graphs",
    "MLX_CUDA_GRAPH_CACHE_SIZE": "how many graphs are kept: each holds memory of the GPU",
    "MLX_METAL_GPU_ARCH": "which kernels are chosen",
    "MLX_TUNE_NO_WIRING": "mt.wired_limit does nothing",
    "MTL_DEBUG_LAYER": "Metal checks every call: slow",
    "METAL_DEVICE_WRAPPER_TYPE": "Metal checks every call: slow",
    "CUDA_VISIBLE_DEVICES": "which GPUs are seen",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for: slow",
}


@check(
    "environment",
    THEME,
    remedies={"unset": "unset {names}   # unless you set them on purpose"},
)
def environment(variables: Mapping[str, str] | None = None) -> Finding:
    """No environment variable changes MLX's memory behaviour behind your back.

    Variables that were set for one experiment stay in a shell or a profile and change the figures of the next one.
    """
    variables = os.environ if variables is None else variables
    there = [name for name in VARIABLES if name in variables]
    if not there:
        return passed("nothing is set that changes how MLX uses memory")
    text = "; ".join(f"{name}={variables[name]} ({VARIABLES[name]})" for name in there)
    return warned(
        text, "unset", {"names": " ".join(there)}, figures={"variables": {name: variables[name] for name in there}}
    )
