import base64
import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from mlx_tune.diagnosis.checks import distributions, installation
from mlx_tune.diagnosis.checks.distributions import installed


def digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


class SitePackages:
    """A folder with the metadata of distributions that were never installed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name, version, tag="py3-none-any", files=None):
        folder = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {tag}\n")
        lines = [f"{folder.name}/METADATA,,"]
        for file, content in (files or {}).items():
            target = self.path / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)  # as an installer does: the last one wins
            lines.append(f"{file},sha256={digest(content)},{len(content)}")
        (folder / "RECORD").write_text("\n".join(lines) + "\n")
        return self

    @property
    def found(self):
        return installed([str(self.path)])


@pytest.fixture
def site(tmp_path):
    return SitePackages(tmp_path / "site-packages")


LIBRARY = "mlx/lib/libmlx.so"


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        ((3, 9, 18), "fail", "MLX needs 3.10"),
        ((3, 10, 1), "fail", "mlx-lm needs 3.11"),
        ((3, 11, 0), "pass", "64 bits"),
        ((3, 14, 0), "pass", "64 bits"),
    ],
)
def test_the_version_of_python(version, status, words):
    result = installation.python.run(version=version, bits=64)
    assert result.status == status
    assert words in result.summary
    assert (result.fix == "") is (status == "pass")


def test_a_32_bit_python_fails():
    result = installation.python.run(version=(3, 12, 0), bits=32)
    assert (result.status, "32 bits" in result.summary) == ("fail", True)


@pytest.mark.parametrize(
    ("system", "machine", "translated", "status", "words"),
    [
        ("Darwin", "x86_64", True, "fail", "Rosetta"),
        ("Darwin", "x86_64", False, "fail", "no wheels for Macs with x86_64"),
        ("Darwin", "arm64", False, "pass", "native"),
        ("Linux", "x86_64", False, "pass", "native"),
        ("Linux", "riscv64", False, "fail", "riscv64"),
        ("Windows", "AMD64", False, "fail", "Windows"),
    ],
)
def test_the_architecture(system, machine, translated, status, words):
    result = installation.architecture.run(system=system, machine=machine, translated=translated)
    assert result.status == status
    assert words in result.summary


@pytest.mark.parametrize(
    ("tag", "macos", "status", "words"),
    [
        ("macosx_26_0_arm64", (15, 6), "fail", "macOS 15.6 is older than the 26.0"),
        ("macosx_14_0_arm64", (14, 7), "warn", "cannot keep memory wired"),
        ("macosx_14_0_arm64", (15, 0), "pass", "the wheels need 14.0"),
        ("macosx_15_0_arm64", (26, 1), "pass", "the wheels need 15.0"),
    ],
)
def test_the_version_of_macos_for_the_wheel(site, tag, macos, status, words):
    site.add("mlx-metal", "0.32.4", f"py3-none-{tag}")
    result = installation.wheel.run(found=site.found, macos=macos, system="Darwin")
    assert result.status == status
    assert words in result.summary


def test_a_mac_that_is_too_old_is_told_which_version_it_needs(site):
    site.add("mlx-metal", "0.32.4", "py3-none-macosx_26_0_arm64")
    assert "Update macOS to 26.0" in installation.wheel.run(found=site.found, macos=(15, 0), system="Darwin").fix


@pytest.mark.parametrize(("glibc", "status"), [((2, 31), "fail"), ((2, 35), "pass"), ((2, 40), "pass"), ((), "skip")])
def test_the_version_of_glibc_for_the_wheel(site, glibc, status):
    site.add("mlx-cpu", "0.32.4", "py3-none-manylinux_2_35_x86_64")
    assert installation.wheel.run(found=site.found, glibc=glibc, system="Linux").status == status


def test_linux_without_a_backend_fails_with_the_extra_to_install(site):
    site.add("mlx", "0.32.4")
    result = installation.mlx_backend.run(found=site.found, system="Linux")
    assert result.status == "fail"
    assert "without a backend" in result.summary
    assert "uv pip install 'mlx[cpu]==0.32.4'" in result.fix


def test_no_mlx_at_all_fails(site):
    result = installation.mlx_backend.run(found=site.found, system="Darwin")
    assert (result.status, result.fix) == ("fail", "uv pip install mlx-tune-kit")


def test_a_backend_is_named(site):
    site.add("mlx", "0.32.4").add("mlx-cpu", "0.32.4")
    result = installation.mlx_backend.run(found=site.found, system="Linux")
    assert (result.status, result.summary) == ("pass", "mlx 0.32.4 with mlx-cpu 0.32.4")


def test_an_mlx_with_its_own_library_needs_no_backend(site):
    site.add("mlx", "0.26.0", files={LIBRARY: b"library"})
    assert installation.mlx_backend.run(found=site.found, system="Linux").status == "pass"


def test_versions_that_differ_fail_with_the_command_that_aligns_them(site):
    site.add("mlx", "0.32.4").add("mlx-cpu", "0.31.2")
    result = installation.mlx_versions.run(found=site.found)
    assert result.status == "fail"
    assert "mlx is 0.32.4, but mlx-cpu 0.31.2" in result.summary
    assert result.fix == "uv pip install --force-reinstall 'mlx[cpu]==0.32.4'"


def test_files_that_went_with_another_wheel_are_missed(site):
    shared = {f"mlx/{name}.py": b"" for name in ("extension", "utils")}
    site.add("mlx", "0.32.4", files=shared | {"mlx/nn/__init__.py": b""})
    site.add("mlx-cpu", "0.31.2", files=shared | {LIBRARY: b"library"})
    result = installation.mlx_files.run(found=site.found)
    assert (result.status, result.summary) == ("pass", "8 files, none is missing")
    for file in shared:  # what upgrading mlx-cpu alone does
        (site.path / file).unlink()
    site.add("mlx-cpu", "0.32.4", files={LIBRARY: b"library"})
    shutil.rmtree(site.path / "mlx_cpu-0.31.2.dist-info")
    result = installation.mlx_files.run(found=site.found)
    assert (result.status, result.summary) == ("fail", "mlx/extension.py of mlx 0.32.4 and 1 more are gone")
    assert result.fix == "uv pip install --force-reinstall 'mlx[cpu]==0.32.4'"


def test_one_file_that_is_gone_is_named(site):
    site.add("mlx", "0.32.4", files={"mlx/nn/__init__.py": b""})
    (site.path / "mlx/nn/__init__.py").unlink()
    assert installation.mlx_files.run(found=site.found).summary == "mlx/nn/__init__.py of mlx 0.32.4 is gone"


def test_headers_that_an_image_leaves_out_are_not_missed(site):
    site.add("mlx-cpu", "0.32.4", files={"mlx/include/mlx/array.h": b"", LIBRARY: b"library"})
    (site.path / "mlx/include/mlx/array.h").unlink()
    assert installation.mlx_files.run(found=site.found).status == "pass"


def test_without_mlx_no_file_is_missed(site):
    assert installation.mlx_files.run(found=site.found).status == "skip"


def test_versions_that_agree_pass(site):
    site.add("mlx", "0.32.4").add("mlx-cuda-12", "0.32.4")
    assert installation.mlx_versions.run(found=site.found).status == "pass"


def test_two_backends_fail_and_the_hash_says_whose_library_it_is(site):
    site.add("mlx", "0.32.4")
    site.add("mlx-cpu", "0.32.4", files={LIBRARY: b"for the processor"})
    site.add("mlx-cuda-12", "0.32.4", files={LIBRARY: b"for the GPU"})
    result = installation.one_backend.run(found=site.found, nvidia=True)
    assert result.status == "fail"
    assert "mlx-cpu and mlx-cuda-12 are both installed; libmlx comes from mlx-cuda-12" in result.summary
    assert result.figures == {"owner": ["mlx-cuda-12"]}
    uninstall = "uv pip uninstall mlx-cpu mlx-cuda-12 && uv pip install --force-reinstall"
    assert result.fix == f"{uninstall} 'mlx[cuda12]==0.32.4'"
    without = installation.one_backend.run(found=site.found, nvidia=False)  # nothing there that it could run on
    assert without.fix == f"{uninstall} 'mlx[cpu]==0.32.4'"


def test_on_a_mac_no_extra_brings_the_backend_that_stays(site):
    site.add("mlx-cpu", "0.32.4").add("mlx-metal", "0.32.4", files={"mlx/lib/libmlx.dylib": b"for the GPU"})
    fix = installation.one_backend.run(found=site.found, nvidia=False).fix
    assert fix == "uv pip uninstall mlx-metal mlx-cpu && uv pip install --force-reinstall 'mlx'"


def test_where_mlx_is_missing_on_linux_the_processors_backend_comes_with_it(site, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert distributions.with_backend(site.found) == {"mlx_with_its_backend": "'mlx[cpu]'"}
    site.add("mlx", "0.32.4").add("mlx-cuda-13", "0.32.4")
    assert distributions.with_backend(site.found) == {"mlx_with_its_backend": "'mlx[cuda13]==0.32.4'"}


def test_a_library_that_belongs_to_nobody_fails(site):
    site.add("mlx-cpu", "0.32.4", files={LIBRARY: b"for the processor"})
    (site.path / LIBRARY).write_bytes(b"something else")
    result = installation.one_backend.run(found=site.found)
    assert result.status == "fail"
    assert "libmlx is not the file that mlx-cpu 0.32.4 brought" in result.summary


def test_a_library_that_went_with_another_backend_fails(site):
    site.add("mlx-cpu", "0.32.4", files={LIBRARY: b"for the processor"})
    (site.path / LIBRARY).unlink()
    result = installation.one_backend.run(found=site.found)
    assert (result.status, result.summary) == ("fail", "libmlx is gone, although mlx-cpu 0.32.4 brought it")
    assert result.fix.startswith("uv pip install --force-reinstall 'mlx[cpu]")


def test_one_genuine_backend_passes(site):
    site.add("mlx-cpu", "0.32.4", files={LIBRARY: b"for the processor"})
    result = installation.one_backend.run(found=site.found)
    assert (result.status, result.summary) == ("pass", "mlx-cpu alone, libmlx is its own")


@pytest.mark.parametrize(
    ("names", "status", "words"),
    [
        ((), "pass", "no other"),
        (("mlx-tune",), "fail", "which is another project"),
        (("mlx-tune", "mlx-tune-kit"), "fail", "shares the package mlx_tune with mlx-tune-kit"),
    ],
)
def test_the_unrelated_distribution_of_the_same_name(site, names, status, words):
    for name in names:
        site.add(name, "0.4.0")
    result = installation.mlx_tune_name.run(found=site.found)
    assert result.status == status
    assert words in result.summary


def test_what_an_interrupted_uninstall_left_is_passed_over(site):
    site.add("mlx", "0.32.4")
    (site.path / "mlx_cpu-0.31.0.dist-info").mkdir()
    (site.path / "mlx-0.32.4.dist-info" / "RECORD").write_text("\n\nonly a path\n")
    assert set(site.found) == {"mlx"}


def plant_mlx(path: Path, source: str) -> dict[str, str]:
    """A folder first on the path whose `mlx.core` does what the source says."""
    (path / "mlx").mkdir()
    (path / "mlx" / "__init__.py").write_text("")
    (path / "mlx" / "core.py").write_text(source)
    return {**os.environ, "PYTHONPATH": str(path)}


@pytest.mark.parametrize(
    ("source", "words", "fix"),
    [
        (
            "raise ImportError('libmlx.so: cannot open shared object file: No such file or directory')",
            "libmlx.so: cannot open",
            "uv pip install --force-reinstall 'mlx[cpu]'",
        ),
        (
            "raise ImportError('core.so: undefined symbol: _ZN3mlx4core9cumulativeE')",
            "undefined symbol",
            "so that both match",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11", "--force-reinstall"),
        (
            "try:\n import mlx._reprlib_fix\nexcept ImportError as e:\n raise ImportError('initializing') from e",
            "ModuleNotFoundError: No module named 'mlx._reprlib_fix'; ImportError: initializing",
            "--force-reinstall",
        ),
        ("import os; os._exit(3)", "ended with code 3 and said nothing", "--force-reinstall"),
    ],
)
def test_an_import_that_dies_is_reported_and_harms_nobody(tmp_path, source, words, fix):
    result = installation.mlx_import.run(environment=plant_mlx(tmp_path, source))
    assert result.status == "fail"
    assert words in result.summary
    assert fix in result.fix


def test_an_import_that_works_names_the_version(tmp_path):
    environment = plant_mlx(tmp_path, "__version__ = '9.9.9'")
    result = installation.mlx_import.run(python=sys.executable, environment=environment)
    assert (result.status, result.summary) == ("pass", "mlx.core 9.9.9 imports")


def test_a_missing_mlx_lm_warns():
    result = installation.mlx_lm.run(name="a_package_that_nobody_has")
    assert result.status == "warn"
    assert "pip install -U mlx-lm" in result.fix


def test_a_broken_mlx_lm_fails(tmp_path, monkeypatch):
    (tmp_path / "broken_mlx_lm.py").write_text("from json import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    result = installation.mlx_lm.run(name="broken_mlx_lm")
    assert result.status == "fail"
    assert "no_such_name" in result.summary
