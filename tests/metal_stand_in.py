"""A recording stand-in for the part of MLX that wires memory, for machines without Metal.

It does what metal/allocator.cpp and python/src/memory.cpp do: `set_wired_limit` returns the previous limit, refuses
with ValueError only what is above the recommended working set, and with TypeError what is no whole number of bytes.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

GIB = 2**30


class MetalStandIn:
    """What `install` puts in place of MLX's own functions, and what they were called with."""

    def __init__(self, memory_bytes: int = 64 * GIB, recommended_bytes: int = 48 * GIB, baseline: int = 0) -> None:
        self.memory_bytes = memory_bytes
        self.recommended_bytes = recommended_bytes
        self.limit = baseline
        self.calls: list[tuple[str, object]] = []
        self.refuse_above: int | None = None
        self.broken_streams: set[object] = set()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> MetalStandIn:
        monkeypatch.delenv("MLX_TUNE_NO_WIRING", raising=False)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", self.device_info)
        monkeypatch.setattr(mx, "set_wired_limit", self.set_wired_limit)
        monkeypatch.setattr(mx, "clear_cache", lambda: self.calls.append(("clear", None)))
        monkeypatch.setattr(mx, "synchronize", self.synchronize)
        return self

    def device_info(self) -> dict[str, object]:
        return {
            "device_name": "Apple M0 Stand-in",
            "architecture": "applegpu_g0",
            "memory_size": self.memory_bytes,
            "max_recommended_working_set_size": self.recommended_bytes,
        }

    def set_wired_limit(self, limit: int) -> int:
        if not isinstance(limit, int) or limit < 0:
            raise TypeError("set_wired_limit(): incompatible function arguments")
        if limit > self.recommended_bytes:
            raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size")
        if self.refuse_above is not None and limit > self.refuse_above:
            raise RuntimeError("refused by the stand-in")
        self.calls.append(("set", limit))
        self.limit, previous = limit, self.limit
        return previous

    def synchronize(self, stream: object = None) -> None:
        self.calls.append(("synchronize", stream))
        if stream in self.broken_streams:
            raise RuntimeError("[METAL] Command buffer execution failed")

    @property
    def limits(self) -> list[object]:
        """Every limit that was set, in order."""
        return [value for name, value in self.calls if name == "set"]


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> MetalStandIn:
    """A 64 GiB Mac that recommends 48."""
    return MetalStandIn().install(monkeypatch)
