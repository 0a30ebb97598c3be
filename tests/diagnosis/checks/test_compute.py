import mlx.core as mx
import pytest

from mlx_tune.diagnosis.checks import compute

RIGHT = ("double", lambda a, b: 2 * a, lambda a, b: 2 * a, 1e-6)
WRONG = ("triple", lambda a, b: 2 * a, lambda a, b: 3 * a, 1e-6)
NAN = ("root", lambda a, b: mx.sqrt(-mx.abs(a) - 1), lambda a, b: a, 1e-6)


def test_the_processors_kernels_are_right():
    assert compute.kernel_cpu.run().status == "pass"


@pytest.mark.parametrize("fault", [WRONG, NAN])
@pytest.mark.parametrize("check", [compute.kernel_cpu, compute.kernel_gpu])
def test_a_kernel_with_wrong_numbers_fails_by_name(check, fault):
    planted = {"operations": [RIGHT, fault]}
    if check is compute.kernel_gpu:
        planted["count"] = 1
    result = check.run(**planted)
    assert result.status == "fail"
    assert result.summary.startswith(f"{fault[0]} is off by")
    assert RIGHT[0] not in result.summary
    assert result.fix.startswith("uv pip install --force-reinstall 'mlx")


def test_without_a_gpu_its_kernels_are_skipped():
    assert compute.kernel_gpu.run(count=0).status == "skip"


def test_a_kernel_that_raises_is_its_own_failure():
    def broken(a, b):
        raise RuntimeError("[metal::Device] Unable to load kernel")

    result = compute.kernel_cpu.run(operations=[("broken", broken, broken, 0.0)])
    assert result.status == "fail"
    assert "Unable to load kernel" in result.summary


@pytest.mark.parametrize(
    ("default", "gpu", "status"), [("cpu", True, "warn"), ("gpu", True, "pass"), ("cpu", False, "pass")]
)
def test_the_default_device(default, gpu, status):
    result = compute.default_device.run(default=default, gpu=gpu)
    assert result.status == status
    assert ("mx.set_default_device(mx.gpu)" in result.fix) is (status == "warn")


REFERENCE = ["/venv/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0", "/venv/numpy.libs/libscipy_openblas64_-1.so"]
OPENBLAS = "/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0"


BROKEN = "/usr/lib/openblas-of-another-processor.so.0"


def measure(library):
    return None if library == BROKEN else 200.0


def run_blas(loaded=REFERENCE, libraries=(OPENBLAS,), measure=measure, rate=4.0, system="Linux"):
    return compute.blas.run(rate=rate, loaded=loaded, libraries=libraries, measure=measure, system=system)


def test_the_reference_blas_warns_with_the_line_and_both_figures():
    result = run_blas()
    assert result.status == "warn"
    assert result.summary == "the reference BLAS: 4.0 GFLOP/s, 200 with libopenblas.so.0"
    assert result.fix == f"export LD_PRELOAD={OPENBLAS}"
    assert result.figures == {"gflops": 4.0, "preloaded": 200.0}


def test_where_openblas_is_missing_it_says_how_to_get_it():
    result = run_blas(libraries=[])
    assert (result.status, result.summary) == ("warn", "the reference BLAS, 4.0 GFLOP/s; OpenBLAS is not installed")
    assert "apt install libopenblas0-pthread" in result.fix


def test_a_library_that_mlx_does_not_start_with_is_passed_over():
    assert run_blas(libraries=[BROKEN, OPENBLAS]).fix == f"export LD_PRELOAD={OPENBLAS}"
    alone = run_blas(libraries=[BROKEN])
    assert alone.status == "warn"
    assert "openblas-of-another-processor.so.0 cannot be preloaded" in alone.summary


@pytest.mark.cpu_only
def test_what_cannot_be_preloaded_is_told_from_what_can(tmp_path):
    dies = tmp_path / "sitecustomize.py"
    dies.write_text("raise SystemExit('with this nothing starts')")
    assert compute._gflops_with("") > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert compute._gflops_with("") is None


def test_a_fast_blas_passes():
    result = run_blas(loaded=[*REFERENCE, OPENBLAS])
    assert (result.status, result.summary) == ("pass", "libopenblas.so.0, 4 GFLOP/s")


def test_a_library_that_gains_nothing_is_not_recommended():
    result = run_blas(rate=50.0, measure=lambda _: 50.0)
    assert (result.status, result.fix) == ("pass", "")


def test_elsewhere_there_is_no_blas_to_replace():
    assert run_blas(system="Darwin").status == "skip"


def test_gflops_are_measured():
    assert compute.matmul_gflops(64) > 0
