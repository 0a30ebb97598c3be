import mlx.core as mx
import pytest

from mlx_tune.diagnosis.checks import bench, compute, gpu, machine, readings
from mlx_tune.diagnosis.checks.distributions import Installed
from mlx_tune.diagnosis.checks.readings import NvidiaGpu


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
