"""The machine: its backend, its limits, and the memory that is free now.

The only reader of `mx.device_info` and of the operating system's counters. This file does not import MLX until a
function that asks MLX something is called, so the doctor can use the rest where `import mlx.core` fails.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_tune.presentation.plain import Json
from mlx_tune.units import format_bytes

Backend = Literal["metal", "cuda", "cpu"]

#: A cgroup limit above this means "none": version 1 writes the largest page-aligned 64-bit number.
_NO_CGROUP_LIMIT = 1 << 60

#: Where `mx.device_info` says how much memory there is; the CPU backend does not.
_MEMORY_KEY = {"metal": "memory_size", "cuda": "total_memory"}


@dataclass(frozen=True)
class Machine:
    """The facts of a machine that do not change while the process runs.

    Attributes:
        backend: The allocator that MLX uses here: "metal", "cuda" or "cpu".
        name: The accelerator's name, or the processor's on the CPU backend.
        architecture: As MLX says it, such as "applegpu_g16s", "sm_90" or "x86_64".
        memory_bytes: The memory that MLX allocates from: RAM, or the GPU's own on CUDA.
        working_set_bytes: The size that Metal recommends not to exceed; None elsewhere.
        system: The operating system and its version.
    """

    backend: Backend
    name: str
    architecture: str
    memory_bytes: int
    working_set_bytes: int | None
    system: str

    def __str__(self) -> str:
        """One line."""
        text = f"{self.name} ({self.backend}, {self.architecture}), {format_bytes(self.memory_bytes)}"
        if self.working_set_bytes is not None:
            text += f", recommended working set {format_bytes(self.working_set_bytes)}"
        return f"{text}, {self.system}"

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Room:
    """Memory that could still be taken, as one counter sees it.

    Attributes:
        bytes: The size.
        source: Which counter says so.
    """

    bytes: int
    source: str


def backend() -> Backend:
    """The backend whose allocator counts every array of this process, on whatever device an operation runs."""
    import mlx.core as mx

    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "cpu"


def computes_on_cpu() -> bool:
    """True where operations run on the CPU unless they are told otherwise: no GPU, or the CPU was made the default."""
    import mlx.core as mx

    return backend() == "cpu" or mx.default_device() == mx.Device(mx.cpu)


def gpu_count() -> int:
    """The number of GPUs that MLX can reach.

    `mx.metal.is_available()` says what MLX was built for: a headless or sandboxed session may get no device all the
    same.
    """
    import mlx.core as mx

    return mx.device_count(mx.gpu) if mx.metal.is_available() or mx.cuda.is_available() else 0


def device_info() -> dict[str, Any]:
    """`mx.device_info()` of the device whose allocator is in use. Keys differ by backend."""
    import mlx.core as mx

    apple = metal_info()
    if apple is not None:
        return apple
    info = mx.device_info()
    # Where a script made the CPU its default device, the plain call describes the CPU, but arrays still come out of
    # the GPU's allocator.
    if _MEMORY_KEY.get(backend(), "device_name") not in info:
        info = mx.device_info(mx.gpu)
    return dict(info)


def metal_info() -> dict[str, Any] | None:
    """`mx.device_info()` of the Apple GPU, as far as it says; None without one.

    Asks MLX's own attributes and nothing else, so that a stand-in for `mx.metal.is_available` and
    `mx.device_info` is believed on any machine.

    Raises:
        RuntimeError: This session gets no device of Metal.
    """
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    info = mx.device_info()
    describes_cpu = "device_name" in info and not {"memory_size", "max_recommended_working_set_size"} & info.keys()
    return dict(mx.device_info(mx.gpu) if describes_cpu else info)


def machine() -> Machine:
    """Read what this machine is.

    Examples:
        >>> machine().backend in ("metal", "cuda", "cpu")
        True
    """
    kind, info = backend(), device_info()
    memory = _MEMORY_KEY.get(kind)
    working_set = info.get("max_recommended_working_set_size") if kind == "metal" else None
    return Machine(
        backend=kind,
        name=str(info.get("device_name", "unknown")),
        architecture=str(info.get("architecture", platform.machine())),
        memory_bytes=int(info[memory]) if memory in info else ram_bytes(),
        working_set_bytes=None if working_set is None else int(working_set),
        system=system_name(),
    )


def system_name() -> str:
    """The operating system and its version, as people say it."""
    mac = macos_version()
    return f"macOS {'.'.join(map(str, mac))}" if mac else f"{platform.system()} {platform.release()}"


def macos_version() -> tuple[int, ...] | None:
    """The version of macOS, such as (15, 4), or None where it is another system."""
    text = platform.mac_ver()[0]
    return tuple(int(part) for part in text.split(".") if part.isdigit()) or None if text else None


def ram_bytes() -> int:
    """All the RAM that this process could ever have: the machine's, or its container's where that is less."""
    import psutil

    limits = [group.limit_bytes for group in cgroup_memory()]
    return min([int(psutil.virtual_memory().total), *limits])


def free_rooms() -> tuple[Room, ...]:
    """Every counter that bounds what may still be allocated now, by MLX or anything else; the smallest decides.

    Caches that the system would give up are counted as free. The memory that MLX itself holds is not: see
    `memory_budget`.
    """
    import psutil

    if backend() == "cuda":
        return (Room(int(device_info()["free_memory"]), "free GPU memory"),)
    rooms = [Room(int(psutil.virtual_memory().available), "RAM available without swapping")]
    rooms += [Room(max(0, g.limit_bytes - g.used_bytes), f"container limit {g.path}") for g in cgroup_memory()]
    return tuple(rooms)


def footprint_bytes(pid: int | None = None) -> int:
    """The memory that the system charges a process with: the physical footprint on macOS, else resident memory.

    Args:
        pid: The process; this one by default.

    Raises:
        OSError: macOS does not say it of another user's process.
    """
    if sys.platform == "darwin":
        return _darwin_footprint_bytes(pid)
    import psutil

    return int(psutil.Process(pid).memory_info().rss)


def swap_used_bytes() -> int:
    """Swap in use, by all processes."""
    import psutil

    return int(psutil.swap_memory().used)


@dataclass(frozen=True)
class CgroupMemory:
    """The memory limit of one control group that holds this process.

    Attributes:
        path: The group's name.
        limit_bytes: The most that it may hold.
        used_bytes: The memory that it holds, less the file cache that it would give up.
    """

    path: str
    limit_bytes: int
    used_bytes: int


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[CgroupMemory]:
    """The limits of every control group above this process, versions 1 and 2; empty where there are none.

    Args:
        root: Where the groups are mounted.
        own: The file that says which groups this process is in.
    """
    if not own.is_file():
        return []
    found: dict[str, CgroupMemory] = {}
    for line in own.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used, cache = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        # Inside a container the group's own name may not exist below the mount: its root then is the group.
        parts = Path(name.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            group = base.joinpath(*parts[:depth])
            read = _read_cgroup(group, limit, used, cache)
            if read is not None:
                path = "/" + "/".join(parts[:depth])
                found.setdefault(str(group), CgroupMemory(path, *read))
    return list(found.values())


def _read_cgroup(group: Path, limit: str, used: str, cache: str) -> tuple[int, int] | None:
    try:
        limit_text = (group / limit).read_text().strip()
        used_bytes = int((group / used).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such group, or its memory is not counted
    if limit_text == "max" or int(limit_text) >= _NO_CGROUP_LIMIT:
        return None
    return int(limit_text), max(0, used_bytes - int(statistics.get(cache, 0)))


def sysctl(name: str) -> int | None:
    """A whole number out of macOS's `sysctl`, or None where there is no such entry or no macOS."""
    if sys.platform != "darwin":
        return None
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    library = ctypes.CDLL(None)
    if library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0) != 0:
        return None
    # A 32-bit entry fills the low half, as Apple's processors are little-endian.
    return int(value.value)


def _darwin_footprint_bytes(pid: int | None) -> int:
    """`ri_phys_footprint` of libproc's `rusage_info_v0`: a 16-byte UUID, then 64-bit counters, it being the eighth."""
    record = (ctypes.c_uint64 * 12)()
    pid = os.getpid() if pid is None else pid
    if ctypes.CDLL(None).proc_pid_rusage(pid, 0, ctypes.byref(record)) != 0:
        raise OSError(f"proc_pid_rusage refused to say what process {pid} holds")
    return int(record[2 + 7])
