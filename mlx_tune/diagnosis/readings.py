"""What only the checks read of the system."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Neighbour:
    """Another process that holds memory.

    Attributes:
        pid: Its number.
        name: Its program.
        bytes: Resident memory, or memory of the GPU.
        on_gpu: Whether it is the GPU's.
    """

    pid: int
    name: str
    bytes: int
    on_gpu: bool = False


@dataclass(frozen=True)
class NvidiaGpu:
    """A GPU as `nvidia-smi` lists it.

    Attributes:
        name: Its name.
        driver: The driver's version, such as (550, 54, 14).
        capability: Its compute capability, such as (9, 0).
    """

    name: str
    driver: tuple[int, ...]
    capability: tuple[int, ...]


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

    The processes that this one descends from are its own.
    """
    import psutil

    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        memory = process.info["memory_info"]
        if memory is None or process.info["pid"] in own or memory.rss < least_bytes:
            continue
        found.append(Neighbour(process.info["pid"], process.info["name"] or "?", int(memory.rss)))
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


def nvidia_gpus() -> list[NvidiaGpu] | None:
    """The NVIDIA GPUs, or None where there is no `nvidia-smi` that works."""
    text = _nvidia_smi("--query-gpu=name,driver_version,compute_cap")
    return parse_gpus(text) if text else None


def parse_gpus(text: str) -> list[NvidiaGpu]:
    """Read `nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader,nounits`."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3:
            found.append(NvidiaGpu(parts[0], version(parts[1]), version(parts[2])))
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
    """What a command prints; nothing where there is none, or where it fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout if ended.returncode == 0 else ""


def session_type() -> str | None:
    """What kind of session this is on macOS: "Aqua" with a screen, "Background" over ssh, "System"; None elsewhere."""
    if sys.platform != "darwin":
        return None
    return command_output(["launchctl", "managername"]).strip() or None
