import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_tune.devices import cgroup_memory
from mlx_tune.diagnosis.checks import bench, compute, gpu, machine, readings
from mlx_tune.diagnosis.checks.distributions import Installed
from mlx_tune.diagnosis.checks.readings import Neighbour, NvidiaGpu

GB = 10**9


@pytest.mark.parametrize(("available", "status"), [(8 * GB, "pass"), (GB, "warn"), (GB // 2, "warn")])
def test_memory(available, status):
    result = machine.memory.run(total=16 * GB, available=available)
    assert result.status == status
    assert result.figures == {"total_bytes": 16 * GB, "available_bytes": available}


@pytest.mark.parametrize(
    ("used", "pressure", "status", "words"),
    [
        (0, None, "pass", "0 B of swap"),
        (5 * GB, None, "warn", "5.00 GB of swap"),
        (GB, 1, "pass", "memory pressure normal"),
        (GB, 2, "warn", "memory pressure warning"),
        (GB, 4, "warn", "memory pressure critical"),
    ],
)
def test_swap(used, pressure, status, words):
    result = machine.swap.run(used=used, total=16 * GB, pressure=pressure)
    assert result.status == status
    assert words in result.summary


def plant_cgroup(tmp_path, limit):
    group = tmp_path / "cgroup" / "job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{GB}\n")
    (group / "memory.stat").write_text("inactive_file 0\n")
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    return cgroup_memory(tmp_path / "cgroup", own)


def test_a_container_that_may_hold_less_than_mlx_thinks_warns(tmp_path):
    result = machine.container.run(groups=plant_cgroup(tmp_path, 4 * GB), host=64 * GB)
    assert result.status == "warn"
    assert "the container may hold 4.00 GB, 3.00 GB of it are free" in result.summary
    assert 'mt.memory_limit("3.60GB")' in result.fix


def test_a_container_as_large_as_the_host_passes(tmp_path):
    assert machine.container.run(groups=plant_cgroup(tmp_path, 60 * GB), host=64 * GB).status == "pass"


def test_no_container_is_skipped(tmp_path):
    assert machine.container.run(groups=plant_cgroup(tmp_path, "max"), host=64 * GB).status == "skip"


@pytest.mark.parametrize(("megabytes", "status"), [(None, "pass"), (0, "pass"), (48_000, "pass"), (62_000, "warn")])
def test_a_wired_limit_that_starves_the_system_warns(megabytes, status):
    result = machine.working_set.run(recommended=48 * 2**30, wired_limit_mb=megabytes, ram=64 * 2**30)
    assert result.status == status
    if status == "warn":
        assert "sudo sysctl iogpu.wired_limit_mb=49152" in result.fix


def test_the_working_set_of_a_stand_in_for_metal(metal):
    result = machine.working_set.run()
    assert result.status == "pass"
    assert "Metal recommends at most 51.5 GB of 68.7 GB" in result.summary


def test_processes_that_hold_much_are_named():
    held = [Neighbour(12, "python3", 9 * GB), Neighbour(13, "browser", GB)]
    result = machine.processes.run(neighbours=held, total=32 * GB)
    assert result.status == "warn"
    assert "python3 (12) 9.00 GB" in result.summary
    assert "browser" not in result.summary


def test_a_process_on_the_gpu_is_named():
    result = machine.processes.run(neighbours=[Neighbour(7, "server", GB, on_gpu=True)], total=32 * GB)
    assert result.status == "warn"
    assert "server (7) 1.00 GB on the GPU" in result.summary


def test_small_processes_are_no_matter():
    assert machine.processes.run(neighbours=[Neighbour(7, "x", GB)], total=32 * GB).status == "pass"


def test_what_nvidia_smi_prints_is_read():
    text = "412, /usr/bin/python3, 2048\n413, [Not Found], [N/A]\n"
    assert readings.parse_compute_apps(text) == [
        Neighbour(412, "python3", 2**31, on_gpu=True),
        Neighbour(413, "[Not Found]", 0, on_gpu=True),
    ]
    assert readings.parse_gpus("NVIDIA H200, 580.65.06, 9.0\n") == [NvidiaGpu("NVIDIA H200", "580.65.06", (9, 0))]
    assert readings.parse_gpus("") == []


def test_what_the_drivers_library_says_is_read():
    text = '{"cuda": 12040, "gpus": [["NVIDIA A100", [8, 0]]]}'
    assert readings.parse_libcuda(text) == [NvidiaGpu("NVIDIA A100", "", (8, 0), (12, 4))]
    assert readings.parse_libcuda("") == []


LIBCUDA = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA Stand-in", length); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 9 : 0; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_gpu_is_found_where_a_container_has_no_nvidia_smi(tmp_path, monkeypatch):
    (tmp_path / "cuda.c").write_text(LIBCUDA)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(readings, "_nvidia_smi", lambda query: "")
    assert readings.nvidia_gpus() == [NvidiaGpu("NVIDIA Stand-in", "", (9, 0), (13, 0))]
    monkeypatch.setattr(readings, "_nvidia_smi", lambda query: "NVIDIA A100, 535.1, 8.0\n")
    assert readings.nvidia_gpus() == [NvidiaGpu("NVIDIA A100", "535.1", (8, 0), (13, 0))]


def test_another_process_that_holds_memory_is_found():
    code = "block = bytearray(90_000_000); block[::4096] = b'x' * len(block[::4096]); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        found = {one.pid: one for one in readings.neighbours(least_bytes=90_000_000)}
        other.communicate("\n")
    assert 90_000_000 <= found[other.pid].bytes < 200_000_000
    assert os.getpid() not in found


def test_a_command_that_is_not_there_prints_nothing():
    assert readings.command_output(["a-command-that-nobody-has"]) == ""


@pytest.mark.parametrize(("free", "status"), [(50 * GB, "pass"), (5 * GB, "warn"), (GB // 2, "fail")])
def test_disk(free, status):
    result = machine.disk.run(free={"models": free, "this folder": 100 * GB})
    assert result.status == status
    assert "free for models" in result.summary


def test_the_disks_of_this_machine_are_found_even_without_a_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    assert set(machine.disk.run().figures["free_bytes"]) == {"this folder", "temporary files", "models"}


def test_variables_that_change_memory_behaviour_are_named():
    result = machine.environment.run(variables={"MLX_MAX_OPS_PER_BUFFER": "1", "HOME": "/home/ann"})
    assert result.status == "warn"
    assert "MLX_MAX_OPS_PER_BUFFER=1" in result.summary
    assert "HOME" not in result.summary
    assert result.fix.startswith("unset MLX_MAX_OPS_PER_BUFFER")


def test_other_variables_pass():
    assert machine.environment.run(variables={"PATH": "/bin"}).status == "pass"


def test_a_virtual_machines_gpu_warns():
    result = gpu.virtual_machine.run(info={"device_name": "Apple Paravirtual device"})
    assert result.status == "warn"
    assert gpu.virtual_machine.run(info={"device_name": "Apple M4 Max"}).status == "pass"


@pytest.mark.parametrize(
    ("session", "variables", "status", "words"),
    [
        ("Background", {"SSH_CONNECTION": "1"}, "warn", "over ssh"),
        ("System", {}, "warn", "a System session, which gets no GPU"),
        ("Aqua", {}, "pass", "Aqua"),
    ],
)
def test_a_session_without_a_screen_warns_where_it_gets_no_gpu(session, variables, status, words):
    result = gpu.headless.run(session=session, variables=variables, system="Darwin", answers=False)
    assert result.status == status
    assert words in result.summary


def test_a_session_without_a_screen_that_gets_the_gpu_is_fine():
    result = gpu.headless.run(session="Background", variables={}, system="Darwin", answers=True)
    assert (result.status, result.summary) == ("pass", "a Background session, which gets the GPU")


@pytest.mark.cpu_only
def test_metal_does_not_answer_here():
    assert not readings.metal_answers()


def test_outside_macos_a_screen_is_no_matter():
    assert gpu.headless.run(system="Linux").status == "skip"


def test_a_mac_without_a_metal_device_fails():
    result = gpu.gpu_present.run(count=0, system="Darwin")
    assert (result.status, "no Metal device" in result.summary) == ("fail", True)
    assert gpu.gpu_present.run(count=0, system="Linux").status == "skip"


def test_a_mac_whose_session_gets_no_device_is_told_once(metal, monkeypatch):
    def no_device(device=None):
        raise RuntimeError("[metal::load_device] No Metal device available.")

    monkeypatch.setattr(mx, "device_info", no_device)
    monkeypatch.setattr(mx, "device_count", lambda kind: 0)
    assert gpu.gpu_present.run(system="Darwin").status == "fail"
    for check in (gpu.virtual_machine, machine.working_set, compute.kernel_gpu, bench.wired):
        assert check.run().status == "skip", check.name
    assert compute.default_device.run().status == "pass"


def cuda_backend(name, tmp_path):
    return {name: Installed(name, "0.32.4", (), tmp_path, {})}


H200 = NvidiaGpu("NVIDIA H200", "580.65.06", (9, 0))


@pytest.mark.parametrize(
    ("backend", "gpus", "status", "words", "fix"),
    [
        ("mlx-cuda-13", [H200], "pass", "driver 580.65.06", ""),
        ("mlx-cuda-12", [NvidiaGpu("A100", "525.60", (8, 0))], "fail", "older than the 550.54.14", "nvidia-driver"),
        ("mlx-cuda-13", [NvidiaGpu("A100", "550.90", (8, 0))], "fail", "older than the 580", "mlx[cuda12]"),
        ("mlx-cuda-12", [NvidiaGpu("V100", "550.90", (7, 0))], "fail", "compute capability 7.0", "mlx[cpu]"),
        ("mlx-cuda-12", [], "fail", "no NVIDIA driver with a GPU", "mlx[cpu]"),
        ("mlx-cuda-13", [NvidiaGpu("A100", "550.90", (8, 0), (13, 0))], "pass", "driver 550.90", ""),
        ("mlx-cuda-12", [NvidiaGpu("A100", "", (8, 0), (12, 4))], "pass", "a driver for CUDA 12.4", ""),
        ("mlx-cuda-13", [NvidiaGpu("A100", "", (8, 0), (12, 8))], "fail", "CUDA 12.8 is older than", "mlx[cuda12]"),
        ("mlx-cuda-12", [NvidiaGpu("A100", "", (8, 0), (12, 2))], "fail", "older than the 550", "nvidia-driver"),
        (None, [H200], "warn", "no CUDA backend", "mlx[cuda12]"),
        (None, [], "skip", "no CUDA backend", ""),
    ],
)
def test_cuda(backend, gpus, status, words, fix, tmp_path):
    found = cuda_backend(backend, tmp_path) if backend else {}
    result = gpu.cuda.run(found=found, gpus=gpus, variables={})
    assert result.status == status
    assert words in result.summary
    assert fix in result.fix


@pytest.mark.parametrize(("value", "status"), [("", "fail"), ("-1", "fail"), ("0", "pass"), ("GPU-0123", "pass")])
def test_a_gpu_that_a_variable_hides_is_told(value, status, tmp_path):
    found, variables = cuda_backend("mlx-cuda-13", tmp_path), {"CUDA_VISIBLE_DEVICES": value}
    result = gpu.cuda.run(found=found, gpus=[H200], variables=variables)
    assert result.status == status
    assert ("hidden: CUDA_VISIBLE_DEVICES" in result.summary) is (status == "fail")
    assert result.fix.startswith("unset CUDA_VISIBLE_DEVICES") is (status == "fail")
