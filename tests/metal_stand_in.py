"""A recording stand-in for what MLX's Metal backend says of memory, for machines without Metal.

Each behaviour has the file and the line of MLX that it was read from, at `COMMIT`; the words in square brackets below
are the keys of `SOURCES`, and `tests/test_metal_stand_in.py` looks each of them up where MLX's repository, or a wheel
of `mlx-metal`, can be had. What is no behaviour of MLX's, and only there to test failures, says so.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import pytest

GIB = 2**30

#: The commit of MLX that lines are of; `mlx-metal` 0.32.4 has the same texts.
COMMIT = "846d176227a0ac13d2667e58d2bb68b322109ab0"

_ALLOCATOR, _DEVICE = "mlx/backend/metal/allocator.cpp", "mlx/backend/metal/device.cpp"
_INFO, _RESIDENT = "mlx/backend/metal/device_info.cpp", "mlx/backend/metal/resident.cpp"

#: Behaviour: file, line, and the words that stand on it.
SOURCES = {
    "available": ("mlx/backend/metal/metal.cpp", 17, "return true;"),
    "info of the default device": ("python/src/device.cpp", 88, "d.value_or(mx::default_device())"),
    "info keys": (_INFO, 45, '{"device_name", name}'),
    "info of the first GPU alone": (_INFO, 57, "if (device_index == 0) {"),
    "resources without sysctl": (_INFO, 41, "rsrc_limit = 499000;"),
    "no device, count": (_INFO, 20, "return 0;"),
    "no device, text": (_DEVICE, 97, '"[metal::load_device] No Metal device available. This typically "'),
    "memory limit": (_ALLOCATOR, 63, "block_limit_ = std::min(1.5 * max_rec_size, 0.95 * memsize);"),
    "collection limit": (_ALLOCATOR, 64, "gc_limit_ = std::min(static_cast<size_t>(0.95 * max_rec_size)"),
    "cache limit": (_ALLOCATOR, 65, "max_pool_size_ = block_limit_;"),
    "virtual machine": (_ALLOCATOR, 67, '"Apple Paravirtual device";'),
    "no heap on it": (_ALLOCATOR, 69, "return;"),
    "set cache limit": (_ALLOCATOR, 83, "std::swap(limit, max_pool_size_);"),
    "set memory limit": (_ALLOCATOR, 89, "std::swap(limit, block_limit_);"),
    "set wired limit": (_ALLOCATOR, 102, "std::swap(limit, wired_limit_);"),
    "wired limit from the start": ("mlx/backend/metal/allocator.h", 71, "size_t wired_limit_{0};"),
    "too large a buffer": (_ALLOCATOR, 116, '"[metal::malloc] Attempting to allocate "'),
    "too many buffers": (_ALLOCATOR, 143, '"[metal::malloc] Resource limit ("'),
    "refused from above": (_ALLOCATOR, 255, "if (limit > std::get<size_t>("),
    "refusal": (_ALLOCATOR, 258, '"[metal::set_wired_limit] Setting a wired limit larger than "'),
    "refusal, its end": (_ALLOCATOR, 259, '"the maximum working set size is not allowed."'),
    "residency from macOS 15": (_RESIDENT, 19, "if (__builtin_available(macOS 15, iOS 18, *)) {"),
    "without residency": (_RESIDENT, 176, "if (!enabled_) {"),
    "what does not fit": (_RESIDENT, 150, "if (total_wired_ + bytes > capacity_) {"),
    "a larger limit adds": (_RESIDENT, 189, "if (total_wired_ < capacity_) {"),
    "a smaller limit removes": (_RESIDENT, 204, "if (total_wired_ <= capacity_) {"),
    "cached buffers stay wired": (_ALLOCATOR, 191, "buffer_cache_.recycle_to_cache(buf);"),
    "released buffers do not": (_ALLOCATOR, 53, "residency_sets_.erase(buf);"),
    "command buffers": (_DEVICE, 513, "return (buffer_ops_ > max_ops) || ((buffer_sizes_ >> 20) > max_mb);"),
    "command buffers, p": (_DEVICE, 605, "max_ops_per_buffer_ = 20;"),
    "command buffers, g": (_DEVICE, 609, "max_ops_per_buffer_ = 40;"),
    "command buffers, s": (_DEVICE, 613, "max_ops_per_buffer_ = 50;"),
    "command buffers, d": (_DEVICE, 617, "max_ops_per_buffer_ = 50;"),
    "command buffers, others": (_DEVICE, 621, "max_ops_per_buffer_ = 40;"),
    "failed work": (_DEVICE, 540, '"[METAL] Command buffer execution failed: {}.",'),
    "failed work, when": (_DEVICE, 572, "error_.check();"),
    "failed work, once": ("mlx/error.h", 39, "auto msg = std::atomic_exchange(&message_, {});"),
    "waiting for work": ("mlx/transforms.cpp", 25, "static constexpr int MAX_ACTIVE_TASKS = 10;"),
}  # fmt: skip

#: Operations and megabytes of a command buffer, by the last letter of the architecture [command buffers].
COMMAND_BUFFERS = {"p": (20, 40), "g": (40, 40), "s": (50, 50), "d": (50, 50)}
OTHER_COMMAND_BUFFERS = (40, 40)

NO_DEVICE = (
    "[metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, or virtualized "
    "macOS sessions where the GPU is not accessible."
)
TOO_LARGE = "[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size is not allowed."
#: What the system says of work for which there was no memory stands in the braces of [failed work].
FAILED = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
VIRTUAL = "Apple Paravirtual device"
_RESOURCES = 499_000


class Residency:
    """The buffers that the system keeps resident: metal/resident.cpp, whose order of buffers is any."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.capacity = 0
        self.tracked: dict[object, int] = {}
        self.resident: set[object] = set()

    @property
    def wired_bytes(self) -> int:
        return sum(self.tracked[buffer] for buffer in self.resident)

    def insert(self, buffer: object, size: int) -> None:
        """A buffer is made; one that does not fit is kept in mind [what does not fit]."""
        if self.enabled:
            self.tracked[buffer] = size
            self._add(buffer)

    def erase(self, buffer: object) -> None:
        """A buffer goes back to the system; no other takes its room [released buffers do not]."""
        if self.enabled:
            self.resident.discard(buffer)
            del self.tracked[buffer]

    def resize(self, capacity: int, order: Iterable[object] | None = None) -> None:
        """[a larger limit adds], [a smaller limit removes]; without residency sets it is no limit of anything."""
        if not self.enabled or capacity == self.capacity:
            return
        self.capacity = capacity
        for buffer in list(self.tracked if order is None else order):
            if self.wired_bytes > capacity:
                self.resident.discard(buffer)
            elif buffer not in self.resident and self.wired_bytes < capacity:
                self._add(buffer)

    def _add(self, buffer: object) -> None:
        if self.wired_bytes + self.tracked[buffer] <= self.capacity:
            self.resident.add(buffer)


class MetalStandIn:
    """What `install` puts in place of MLX's own functions, and what they were called with.

    Args:
        memory_bytes: Of the Mac.
        recommended_bytes: The working set that Metal recommends.
        baseline: A wired limit that was set before.
        name: Of the device.
        architecture: Its last letter says how large command buffers are.
        present: False for a session that gets no device.
        residency: False before macOS 15, or where the device has no residency sets [residency from macOS 15].
    """

    def __init__(
        self,
        memory_bytes: int = 64 * GIB,
        recommended_bytes: int = 48 * GIB,
        baseline: int = 0,
        *,
        name: str = "Apple M0 Stand-in",
        architecture: str = "applegpu_g13g",
        present: bool = True,
        residency: bool = True,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.recommended_bytes = recommended_bytes
        self.name, self.architecture, self.present = name, architecture, present
        self.limit = baseline  # [wired limit from the start] is 0
        self.memory_limit = int(min(1.5 * recommended_bytes, 0.95 * memory_bytes))  # [memory limit]
        self.cache_limit = self.memory_limit  # [cache limit]
        self.collection_limit = min(int(0.95 * recommended_bytes), self.memory_limit)  # [collection limit]
        self.has_heap = name != VIRTUAL  # [virtual machine], [no heap on it]
        self.residency = Residency(enabled=residency)
        self.residency.capacity = baseline
        self.cached: set[object] = set()
        self.calls: list[tuple[str, object]] = []
        #: No behaviour of MLX's: a limit that is refused for no reason at all.
        self.refuse_above: int | None = None
        #: Streams with work on them that has failed.
        self.broken_streams: set[object] = set()
        self._defaults = {"memory": self.memory_limit, "cache": self.cache_limit}
        self._own: dict[str, tuple[Any, int]] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> MetalStandIn:
        monkeypatch.delenv("MLX_TUNE_NO_WIRING", raising=False)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)  # [available], with a device or without
        monkeypatch.setattr(mx, "device_info", self.device_info)
        monkeypatch.setattr(mx, "set_wired_limit", self.set_wired_limit)
        monkeypatch.setattr(mx, "clear_cache", self.clear_cache)
        monkeypatch.setattr(mx, "synchronize", self.synchronize)
        for name in ("memory", "cache"):
            setter = getattr(mx, f"set_{name}_limit")
            before = setter(0)
            setter(before)
            self._own[name] = (setter, before)
            monkeypatch.setattr(mx, f"set_{name}_limit", getattr(self, f"set_{name}_limit"))
        return self

    def device_info(self, d: Any = None) -> dict[str, object]:
        """[info of the default device], which with Metal is the GPU; [info keys], [info of the first GPU alone]."""
        if d is not None and d == mx.cpu:
            return {"device_name": "Apple M0", "architecture": "arm64"}
        if not self.present:
            raise RuntimeError(NO_DEVICE)  # [no device, text]
        if d is not None and d != mx.gpu:
            return {}
        return {
            "device_name": self.name,
            "architecture": self.architecture,
            "max_buffer_length": self.recommended_bytes * 3 // 4,
            "max_recommended_working_set_size": self.recommended_bytes,
            "memory_size": self.memory_bytes,
            "resource_limit": _RESOURCES,  # [resources without sysctl]
        }

    def set_wired_limit(self, limit: int) -> int:
        """[set wired limit] returns the one before; [refused from above], and nothing else is."""
        limit = _whole(limit, "set_wired_limit")
        if not self.present:
            raise RuntimeError(NO_DEVICE)
        if limit > self.recommended_bytes:
            raise ValueError(TOO_LARGE)  # [refusal]
        if self.refuse_above is not None and limit > self.refuse_above:
            raise RuntimeError("refused by the stand-in")
        self.calls.append(("set", limit))
        self.limit, previous = limit, self.limit
        self.residency.resize(limit)
        return previous

    def set_memory_limit(self, limit: int) -> int:
        """[set memory limit] returns the one before; the processor's own allocator keeps to it meanwhile."""
        self.memory_limit, previous = self._set("memory", limit), self.memory_limit
        self.collection_limit = min(self.memory_limit, int(0.95 * self.recommended_bytes))
        return previous

    def set_cache_limit(self, limit: int) -> int:
        """[set cache limit] returns the one before."""
        self.cache_limit, previous = self._set("cache", limit), self.cache_limit
        return previous

    def _set(self, name: str, limit: int) -> int:
        limit = _whole(limit, f"set_{name}_limit")
        setter, own_default = self._own[name]
        setter(own_default if limit == self._defaults[name] else limit)
        return limit

    def make(self, buffer: object, size: int) -> None:
        """A buffer is made for an array."""
        self.residency.insert(buffer, size)

    def free(self, buffer: object) -> None:
        """An array ends, and its buffer waits for the next one [cached buffers stay wired]."""
        self.cached.add(buffer)

    def clear_cache(self) -> None:
        self.calls.append(("clear", None))
        for buffer in self.cached:
            self.residency.erase(buffer)
        self.cached.clear()

    def synchronize(self, stream: object = None) -> None:
        """[failed work, when] it is waited for, with its text [failed work], and [failed work, once]."""
        self.calls.append(("synchronize", stream))
        if stream in self.broken_streams:
            self.broken_streams.discard(stream)
            raise RuntimeError(FAILED)

    @property
    def command_buffer(self) -> tuple[int, int]:
        """Operations and megabytes above which a command buffer is committed."""
        return COMMAND_BUFFERS.get(self.architecture[-1], OTHER_COMMAND_BUFFERS)

    @property
    def limits(self) -> list[object]:
        """Every limit that was set, in order."""
        return [value for name, value in self.calls if name == "set"]


def _whole(limit: Any, function: str) -> int:
    """A number as MLX's bindings take it for a `size_t`: whatever has an index, from 0 to 2**64 - 1."""
    try:
        if 0 <= (number := operator.index(limit)) < 2**64:
            return number
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"{function}(): incompatible function arguments. The following argument types are supported:\n"
        f"    1. {function}(limit: int) -> int\n\nInvoked with types: {type(limit).__name__}"
    )


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> MetalStandIn:
    """A 64 GiB Mac that recommends 48."""
    return MetalStandIn().install(monkeypatch)
