import subprocess
import sys

import pytest
from reported_errors import causes_of, reported

REPORTED = (
    reported(
        "mlx#2500",
        "ImportError: libcublasLt.so.12: cannot open shared object file: No such file or directory",
        "NVIDIA's libraries are missing",
    ),
    reported(
        "glibc, elf/dl-version.c",
        "ImportError: /lib64/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by core.so)",
        "glibc is too old",
    ),
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes


@pytest.mark.parametrize(
    ("file", "code", "cause"),
    [
        ("mlx.py", "import mlx.core", "Another mlx is in the way"),
        ("mlx_tune.py", "from mlx_tune import wired_limit", "Another mlx_tune is in the way"),
        ("mlx_tune.py", "import mlx_tune; mlx_tune.wired_limit", "Another mlx_tune is in the way"),
    ],
)
def test_what_python_says_of_a_file_in_the_way_is_known(tmp_path, file, code, cause):
    (tmp_path / file).touch()
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": ""}, capture_output=True, text=True, check=False
    )
    assert cause in causes_of(ran.stderr.splitlines()[-1])
