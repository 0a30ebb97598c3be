"""The stand-in for Metal against MLX: its source, its wheel, and its own bindings.

`MLX_SOURCE` names a git directory of MLX's repository, `MLX_METAL_WHEEL` a wheel of `mlx-metal`; without them those
tests are skipped.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import zipfile
from pathlib import Path

import metal_stand_in
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metal_stand_in import COMMIT, GIB, SOURCES, MetalStandIn, Residency, metal

import mlx_tune as mt
from mlx_tune import devices
from mlx_tune.graphs.backends import METAL_COMMANDS, METAL_OTHERS, TASKS_IN_FLIGHT
from mlx_tune.wiring.limits import read_capacity

__all__ = ["metal"]

SOURCE, WHEEL = os.environ.get("MLX_SOURCE"), os.environ.get("MLX_METAL_WHEEL")
INSTALLED = Path(mx.__file__).parent / "lib" / "libmlx.dylib"


@pytest.mark.skipif(not SOURCE, reason="needs a git directory of MLX's repository in MLX_SOURCE")
@pytest.mark.parametrize("behaviour", SOURCES)
def test_a_behaviour_stands_on_its_line(behaviour):
    file, line, words = SOURCES[behaviour]
    show = ["git", f"--git-dir={SOURCE}", "show", f"{COMMIT}:{file}"]
    text = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    assert words in text.splitlines()[line - 1]


@pytest.mark.skipif(not WHEEL and not INSTALLED.exists(), reason="needs a Mac, or a wheel in MLX_METAL_WHEEL")
@pytest.mark.parametrize(
    "text",
    [
        metal_stand_in.TOO_LARGE,
        metal_stand_in.NO_DEVICE,
        metal_stand_in.FAILED.partition("Insufficient")[0],
        metal_stand_in.VIRTUAL,
        *MetalStandIn().device_info(),
        "[metal::malloc] Attempting to allocate ",
        "[metal::malloc] Resource limit (",
        "MLX_MAX_OPS_PER_BUFFER",
    ],
)
def test_a_text_is_in_the_library_that_is_shipped(text):
    library = zipfile.ZipFile(WHEEL).read("mlx/lib/libmlx.dylib") if WHEEL else INSTALLED.read_bytes()
    assert text.encode() in library


def test_every_behaviour_that_is_named_has_a_source():
    text = Path(metal_stand_in.__file__).read_text().partition("class Residency")[2]
    named = {name for name in re.findall(r"\[([a-z][\w ,]+)\]", text) if " " in name}
    assert len(named) > 15
    assert {name for name in named if not any(key.startswith(name) for key in SOURCES)} == {
        "str, object",
        "object, int",
        "int, int",
    }


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["set_wired_limit", "set_memory_limit", "set_cache_limit"])
@pytest.mark.parametrize(
    "value",
    [0, 1, True, 2**32, 2**64 - 1, -1, 2**64, 1.5, 2.0, "12", b"5", None, np.int64(5), np.float32(3), mx.array(5)],
    ids=repr,
)
def test_arguments_are_taken_and_refused_as_by_the_bindings(name, value):
    """The processor's allocator has the same bindings."""

    def outcome(function):
        try:
            before = function(value)
        except TypeError as error:
            return str(error)
        function(before)
        return "taken"

    own = outcome(getattr(mx, name))
    with pytest.MonkeyPatch.context() as patch:
        MetalStandIn().install(patch).recommended_bytes = 2**65  # no number that is taken is refused as too large
        assert outcome(getattr(mx, name)) == own


@pytest.mark.parametrize(("memory", "recommended"), [(64, 48), (8, 5.33), (512, 496), (16, 16)])
def test_limits_begin_as_metal_has_them_and_come_back(monkeypatch, memory, recommended):
    metal = MetalStandIn(memory * GIB, int(recommended * GIB)).install(monkeypatch)
    default = int(min(1.5 * int(recommended * GIB), 0.95 * memory * GIB))
    assert (metal.memory_limit, metal.cache_limit) == (default, default)
    assert metal.collection_limit == min(int(0.95 * int(recommended * GIB)), default)
    with mt.memory_limit("1GB"):
        assert metal.memory_limit == metal.collection_limit == 10**9
    assert (metal.memory_limit, metal.cache_limit) == (default, default)
    assert mx.set_cache_limit(5) == default
    assert mx.set_cache_limit(default) == 5


def test_the_processors_own_limits_are_as_they_were():
    def now():
        found = mx.set_memory_limit(0), mx.set_cache_limit(0)
        mx.set_memory_limit(found[0]), mx.set_cache_limit(found[1])
        return found

    before = now()
    with pytest.MonkeyPatch.context() as patch:
        MetalStandIn().install(patch)
        with mt.memory_limit("1MB"):
            assert mx.set_memory_limit(10**6) == 10**6
    assert now() == before


def test_a_refusal_has_metals_words_and_changes_nothing(metal):
    assert mx.set_wired_limit(metal.recommended_bytes) == 0
    with pytest.raises(ValueError, match=r"maximum working set size is not allowed\.$"):
        mx.set_wired_limit(metal.recommended_bytes + 1)
    assert metal.limit == metal.recommended_bytes


def test_devices_are_described_as_metal_does(metal):
    info = mx.device_info()
    assert mx.device_info(mx.gpu) == mx.device_info(mx.Device(mx.gpu, 0)) == info
    assert set(info) == {
        "device_name", "architecture", "max_buffer_length", "max_recommended_working_set_size", "memory_size",
        "resource_limit",
    }  # fmt: skip
    assert mx.device_info(mx.Device(mx.gpu, 1)) == {}
    assert set(mx.device_info(mx.cpu)) == {"device_name", "architecture"}
    assert devices.metal_info() == info


def test_a_session_without_a_device_wires_nothing_and_says_why(monkeypatch):
    MetalStandIn(present=False).install(monkeypatch)
    assert mx.metal.is_available()
    assert "No Metal device available" in read_capacity().reason
    with mt.wired_limit("1GB") as wired:
        assert not wired.applied
    assert wired.reason.startswith("Metal gives this session no device")


def test_a_virtual_machine_is_an_apple_gpu_without_a_heap(monkeypatch):
    metal = MetalStandIn(8 * GIB, 4 * GIB, name=metal_stand_in.VIRTUAL).install(monkeypatch)
    assert not metal.has_heap
    assert devices.machine().name == "Apple Paravirtual device"
    assert devices.machine().working_set_bytes == 4 * GIB
    monkeypatch.setattr(devices, "macos_version", lambda: (15, 4))
    with mt.wired_limit("1GB") as wired:
        assert wired.applied


def test_failed_work_is_told_once_when_it_is_waited_for(metal):
    metal.broken_streams.add("broken")
    mx.synchronize("sound")
    with pytest.raises(RuntimeError, match=r"\[METAL\] Command buffer execution failed: .*OutOfMemory\)\.$"):
        mx.synchronize("broken")
    mx.synchronize("broken")


@pytest.mark.parametrize("letter", [*metal_stand_in.COMMAND_BUFFERS, "x"])
def test_command_buffers_are_as_large_as_estimates_take_them_for(letter):
    rule = METAL_COMMANDS.get(letter, METAL_OTHERS)
    metal = MetalStandIn(architecture=f"applegpu_g16{letter}")
    assert metal.command_buffer == (rule.operations, rule.elements)
    assert str(TASKS_IN_FLIGHT) in SOURCES["waiting for work"][2]


def test_residency_never_exceeds_its_limit_whatever_the_order():
    """Random buffers and limits."""
    for seed in range(300):
        rng = random.Random(seed)
        residency, names = Residency(), itertools.count()
        for _ in range(60):
            action = rng.choice(["insert", "erase", "resize"])
            if action == "insert":
                residency.insert(next(names), rng.randrange(1, 40))
            elif action == "erase" and residency.tracked:
                residency.erase(rng.choice(list(residency.tracked)))
            elif action == "resize":
                order = list(residency.tracked)
                rng.shuffle(order)
                residency.resize(rng.randrange(200), order)
            assert residency.wired_bytes <= residency.capacity
            assert residency.resident <= set(residency.tracked)


def test_without_residency_sets_a_limit_is_stored_and_nothing_is_wired(monkeypatch):
    metal = MetalStandIn(residency=False).install(monkeypatch)
    metal.make("weights", 100)
    assert mx.set_wired_limit(GIB) == 0
    assert (metal.limit, metal.residency.wired_bytes) == (GIB, 0)


@pytest.mark.parametrize("order", list(itertools.permutations(["weights", "garbage", "more garbage"])))
def test_a_model_is_wired_whole_since_the_cache_is_cleared_first(metal, monkeypatch, order):
    """Buffers that wait for reuse take a part of the limit, in whatever order the system asks for them."""
    model = nn.Linear(64, 64, bias=False)
    mx.eval(model.parameters())
    size = model.weight.nbytes
    resize = metal.residency.resize
    monkeypatch.setattr(
        metal.residency, "resize", lambda limit: resize(limit, [b for b in order if b in metal.residency.tracked])
    )
    for buffer in order:
        metal.make(buffer, size)
    for buffer in ("garbage", "more garbage"):
        metal.free(buffer)
    with mt.wired_limit(model, headroom=0):
        assert metal.residency.resident == {"weights"}
    assert metal.residency.wired_bytes == 0


def test_without_clearing_garbage_could_have_taken_its_room(metal):
    metal.make("garbage", 100)
    metal.make("weights", 100)
    metal.free("garbage")
    mx.set_wired_limit(100)
    assert metal.residency.resident == {"garbage"}
