"""Real environments with real faults: MLX's own files, with one thing wrong."""

import _ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_tune

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(sys.platform != "linux", reason="on a Mac one wheel brings everything"),
]
LIBRARY = Path("mlx", "lib", "libmlx.so")
CHECKS = ["mlx-backend", "mlx-versions", "mlx-files", "one-backend", "mlx-import", "kernel-cpu"]


class Environment:
    """A bare environment that takes files over from this one."""

    def __init__(self, path: Path) -> None:
        venv.create(path, with_pip=False, symlinks=True)
        self.python = path / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
        self.source = Path(mx.__file__).parents[1]

    def take(self, name: str) -> None:
        """Take a distribution over, its headers left out."""
        for file in metadata.files(name):
            if "include" in file.parts or ".." in file.parts or file.suffix == ".pyc":
                continue
            target = self.site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix == ".so":
                shutil.copy(file.locate(), target)  # a link would be followed to the library beside the original
            else:
                target.symlink_to(file.locate())

    def examine(self) -> dict[str, dict]:
        """What the doctor says of it, by check."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PYTHONPATH"] = str(Path(mlx_tune.__file__).parents[1])
        command = [self.python, "-m", "mlx_tune", "doctor", "--json", "--only", *CHECKS]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert ended.returncode == 1, ended.stderr
        return {one["name"]: one for one in json.loads(ended.stdout)["checks"]}


@pytest.fixture
def environment(tmp_path):
    made = Environment(tmp_path / "venv")
    made.take("mlx")
    return made


def test_mlx_without_its_backend(environment):
    found = environment.examine()
    assert found["mlx-backend"]["status"] == "fail"
    assert f"'mlx[cpu]=={metadata.version('mlx')}'" in found["mlx-backend"]["fix"]
    assert "libmlx.so: cannot open shared object file" in found["mlx-import"]["summary"]
    assert found["kernel-cpu"]["status"] == "skip"


def test_a_backend_whose_library_is_another(environment):
    environment.take("mlx-cpu")
    shutil.copy(_ctypes.__file__, environment.site / LIBRARY)
    found = environment.examine()
    assert found["mlx-backend"]["status"] == found["mlx-versions"]["status"] == "pass"
    assert "libmlx is not the file that mlx-cpu" in found["one-backend"]["summary"]
    assert "undefined symbol" in found["mlx-import"]["summary"]
    assert "--force-reinstall 'mlx[cpu]'" in found["mlx-import"]["fix"]


def test_a_file_that_went_with_another_wheel(environment):
    environment.take("mlx-cpu")
    (environment.site / "mlx" / "_reprlib_fix.py").unlink()
    found = environment.examine()
    assert found["one-backend"]["status"] == "pass"
    assert "mlx/_reprlib_fix.py" in found["mlx-files"]["summary"]
    assert "No module named 'mlx._reprlib_fix'" in found["mlx-import"]["summary"]
    assert f"'mlx[cpu]=={metadata.version('mlx')}'" in found["mlx-import"]["fix"]
