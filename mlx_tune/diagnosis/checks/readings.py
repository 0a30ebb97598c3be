"""Readings of the system that only the checks need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Neighbour:
    """Another process that holds memory.

    Attributes:
        pid: Its number.
        name: Its program.
        bytes: The memory that the system charges it with, or memory of the GPU.
        on_gpu: True where it is the GPU's.
    """

    pid: int
    name: str
    bytes: int
    on_gpu: bool = False


@dataclass(frozen=True)
class NvidiaGpu:
    """A GPU as `nvidia-smi` or the driver's library lists it.

    Attributes:
        name: Its name.
        driver: The driver's version, such as "550.54.14"; empty where `nvidia-smi` is missing.
        capability: Its compute capability, such as (9, 0).
        cuda: The version of CUDA that the driver's library offers, such as (12, 4): with a compatibility package more
            than the driver's own. Empty where it does not load.
    """

    name: str
    driver: str
    capability: tuple[int, ...]
    cuda: tuple[int, ...] = ()


def available_bytes() -> int:
    """RAM that can be had without swapping; in a container, what its limit leaves."""
    import psutil

    from mlx_tune import devices

    left = [max(0, group.limit_bytes - group.used_bytes) for group in devices.cgroup_memory()]
    return min([int(psutil.virtual_memory().available), *left])


def host_ram_bytes() -> int:
    """The RAM of the machine, whatever a container may have of it."""
    import psutil

    return int(psutil.virtual_memory().total)


def neighbours(least_bytes: int = 500_000_000) -> list[Neighbour]:
    """Other processes that hold at least so much, the largest first, and all others on an NVIDIA GPU.

    The processes that this one descends from are its own. On macOS what a process has on the GPU is in its footprint,
    not in its resident memory.
    """
    import psutil

    from mlx_tune import devices

    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["pid", "name"]):
        pid = process.info["pid"]
        try:
            held = 0 if pid in own else devices.footprint_bytes(pid)
        except (OSError, psutil.Error):
            continue  # another user's, or over by now
        if held >= least_bytes:
            found.append(Neighbour(pid, process.info["name"] or "?", held))
    found.sort(key=lambda one: -one.bytes)
    return found + [one for one in parse_compute_apps(_compute_apps()) if one.pid not in own]


def _compute_apps() -> str:
    return _nvidia_smi("--query-compute-apps=pid,process_name,used_memory")


def parse_compute_apps(text: str) -> list[Neighbour]:
    """Read `nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv,noheader,nounits`."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[0].isdigit():
            size = int(parts[2]) * 2**20 if parts[2].isdigit() else 0  # "[N/A]" inside a container
            found.append(Neighbour(int(parts[0]), Path(parts[1]).name, size, on_gpu=True))
    return found


#: Asks libcuda, which every container with a GPU has; `nvidia-smi` is not in all of them.
_ASK_LIBCUDA = """
import ctypes, json
cuda, number, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.create_string_buffer(100)
def ask(function, *arguments):
    if getattr(cuda, function)(*arguments) != 0:
        raise SystemExit(function)
    return number.value
ask("cuInit", 0)
answer = {"cuda": ask("cuDriverGetVersion", ctypes.byref(number)), "gpus": []}
for device in range(ask("cuDeviceGetCount", ctypes.byref(number))):
    ask("cuDeviceGetName", name, 100, device)
    capability = [ask("cuDeviceGetAttribute", ctypes.byref(number), which, device) for which in (75, 76)]
    answer["gpus"].append([name.value.decode(), capability])
print(json.dumps(answer))
"""


def nvidia_gpus() -> list[NvidiaGpu]:
    """The NVIDIA GPUs that a driver works for; none where there is no driver."""
    listed = parse_gpus(_nvidia_smi("--query-gpu=name,driver_version,compute_cap"))
    offered = parse_libcuda(command_output([sys.executable, "-c", _ASK_LIBCUDA]))
    if not listed:
        return offered
    return [replace(gpu, cuda=offered[0].cuda) for gpu in listed] if offered else listed


def parse_libcuda(text: str) -> list[NvidiaGpu]:
    """Read what `_ASK_LIBCUDA` prints: the version times 1000 plus ten times the minor one, names, capabilities."""
    if not text:
        return []
    answer = json.loads(text)
    cuda = (answer["cuda"] // 1000, answer["cuda"] % 1000 // 10)
    return [NvidiaGpu(name, "", tuple(capability), cuda) for name, capability in answer["gpus"]]


def parse_gpus(text: str) -> list[NvidiaGpu]:
    """Read `nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader,nounits`."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3:
            found.append(NvidiaGpu(parts[0], parts[1], version(parts[2])))
    return found


def version(text: str) -> tuple[int, ...]:
    """The numbers of a version.

    Examples:
        >>> version("550.54.14")
        (550, 54, 14)
    """
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _nvidia_smi(query: str) -> str:
    return command_output(["nvidia-smi", query, "--format=csv,noheader,nounits"])


def command_output(command: list[str], seconds: float = 20) -> str:
    """The output of a command; empty where there is none, or where it fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout if ended.returncode == 0 else ""


def metal_answers() -> bool:
    """True where this session gets a device of Metal, tried in a process of its own."""
    code = "import mlx.core as mx; print(mx.metal.is_available() and mx.device_count(mx.gpu) > 0)"
    return command_output([sys.executable, "-c", code], seconds=60).strip() == "True"


def session_type() -> str | None:
    """The kind of this session on macOS: "Aqua" with a screen, "Background" over ssh, "System"; None elsewhere."""
    if sys.platform != "darwin":
        return None
    return command_output(["launchctl", "managername"]).strip() or None
