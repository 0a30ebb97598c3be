"""What this machine is, and the counters of its memory."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_tune import devices

GB = 10**9


def group(folder, limit, used, cache=0, version=2):
    """Write one control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


def own(tmp_path, text):
    """Write what /proc/self/cgroup would say."""
    file = tmp_path / "cgroup"
    file.write_text(text)
    return file


def test_the_machine_is_described():
    machine = devices.machine()
    assert machine.backend == devices.backend()
    assert machine.memory_bytes > GB
    assert machine.name in str(machine)
    assert json.loads(json.dumps(machine.to_dict()))["backend"] == machine.backend
    assert (machine.working_set_bytes is not None) == (machine.backend == "metal")


def test_the_processes_footprint_grows_with_what_it_holds():
    before = devices.footprint_bytes()
    block = bytearray(64 * 10**6)
    block[::4096] = b"x" * len(block[::4096])  # touch every page
    assert devices.footprint_bytes() - before > 50 * 10**6


def test_rooms_are_positive_and_named():
    rooms = devices.free_rooms()
    assert rooms
    assert all(room.bytes >= 0 and room.source for room in rooms)
    assert max(devices.ram_bytes(), devices.machine().memory_bytes) >= min(room.bytes for room in rooms)
    assert devices.swap_used_bytes() >= 0


def test_a_metal_machine(monkeypatch):
    info = {
        "device_name": "Apple M4 Max",
        "architecture": "applegpu_g16s",
        "memory_size": 64 * GB,
        "max_recommended_working_set_size": 48 * GB,
    }
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    machine = devices.machine()
    assert (machine.backend, machine.memory_bytes, machine.working_set_bytes) == ("metal", 64 * GB, 48 * GB)
    assert "working set 48.0 GB" in str(machine)


def test_a_mac_whose_default_device_is_the_cpu(monkeypatch):
    described = {None: {"device_name": "Apple M4"}, mx.gpu: {"device_name": "Apple M4", "memory_size": 16 * GB}}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device=None: described[device])
    assert devices.machine().memory_bytes == 16 * GB


def test_a_cuda_machine_counts_the_gpus_own_memory(monkeypatch):
    info = {"device_name": "GPU", "architecture": "sm_90", "total_memory": 140 * GB, "free_memory": 100 * GB}
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert devices.machine().memory_bytes == 140 * GB
    assert devices.free_rooms() == (devices.Room(100 * GB, "free GPU memory"),)


def test_cgroup_version_2_every_ancestor_counts(tmp_path):
    root = tmp_path / "fs"
    group(root / "a" / "b", 8 * GB, 3 * GB, cache=1 * GB)
    group(root / "a", 4 * GB, 1 * GB)
    group(root, "max", 0)
    found = devices.cgroup_memory(root, own(tmp_path, "0::/a/b\n"))
    assert [(g.path, g.limit_bytes, g.used_bytes) for g in found] == [("/a/b", 8 * GB, 2 * GB), ("/a", 4 * GB, GB)]


def test_cgroup_version_2_inside_a_container_the_mount_is_the_group(tmp_path):
    root = tmp_path / "fs"
    group(root, 2 * GB, GB)
    found = devices.cgroup_memory(root, own(tmp_path, "0::/docker/0123\n"))
    assert [(g.path, g.limit_bytes) for g in found] == [("/", 2 * GB)]


def test_cgroup_version_1(tmp_path):
    root = tmp_path / "fs"
    group(root / "memory" / "job", 6 * GB, GB, version=1)
    group(root / "memory", 9223372036854771712, GB, version=1)
    found = devices.cgroup_memory(root, own(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/job\n"))
    assert [(g.path, g.limit_bytes, g.used_bytes) for g in found] == [("/job", 6 * GB, GB)]


@pytest.mark.parametrize("text", ["", "0::/\n"])
def test_no_cgroup_limit(tmp_path, text):
    assert devices.cgroup_memory(tmp_path / "fs", own(tmp_path, text)) == []
    assert devices.cgroup_memory(tmp_path / "fs", tmp_path / "absent") == []


def test_a_container_bounds_the_ram_and_the_room(monkeypatch):
    monkeypatch.setattr(devices, "cgroup_memory", lambda: [devices.CgroupMemory("/job", 10**6, 4 * 10**5)])
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert devices.ram_bytes() == 10**6
    assert devices.Room(6 * 10**5, "container limit /job") in devices.free_rooms()


@pytest.mark.parametrize(("text", "version"), [("15.4", (15, 4)), ("14", (14,)), ("", None)])
def test_macos_version(monkeypatch, text, version):
    monkeypatch.setattr(devices.platform, "mac_ver", lambda: (text, ("", "", ""), ""))
    assert devices.macos_version() == version


@pytest.mark.parametrize(
    "info",
    [
        {"max_recommended_working_set_size": 5},
        {"device_name": "Apple M0", "max_recommended_working_set_size": 5},
        {"device_name": "Apple M0", "memory_size": 7},
        {},
    ],
)
def test_a_stand_in_for_metal_is_believed(monkeypatch, info):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert devices.metal_info() == info


def test_metal_is_asked_by_name_where_the_cpu_is_the_default_device(monkeypatch):
    gpu = {"device_name": "Apple M4", "memory_size": 7}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device=None: {"device_name": "CPU"} if device is None else gpu)
    assert devices.metal_info() == gpu


def test_without_metal_there_is_nothing_to_say_about_it(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert devices.metal_info() is None
