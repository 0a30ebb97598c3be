import os
import shutil
import subprocess
import sys

import pytest

from mlx_tune.diagnosis.checks import readings
from mlx_tune.diagnosis.checks.readings import Neighbour, NvidiaGpu


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
    monkeypatch.setenv("PATH", str(tmp_path))
    assert readings.nvidia_gpus() == [NvidiaGpu("NVIDIA Stand-in", "", (9, 0), (13, 0))]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA A100, 535.1, 8.0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
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
