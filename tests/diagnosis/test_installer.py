import sys

import pytest

from mlx_tune.diagnosis import installer


@pytest.fixture(autouse=True)
def remedies_as_they_are_written():
    """Here the real thing is tested."""


@pytest.mark.parametrize(
    ("uv", "pip", "active", "install", "uninstall"),
    [
        (True, True, True, "uv pip install", "uv pip uninstall"),
        (
            True,
            False,
            False,
            "uv pip install --python '/my venv/python'",
            "uv pip uninstall --python '/my venv/python'",
        ),
        (False, True, True, "python -m pip install", "python -m pip uninstall -y"),
        (False, True, False, "'/my venv/python' -m pip install", "'/my venv/python' -m pip uninstall -y"),
        (False, False, True, "uv pip install", "uv pip uninstall"),  # made by uv, which is somewhere
    ],
)
def test_the_command_reaches_the_environment_that_was_looked_at(uv, pip, active, install, uninstall):
    found = installer.commands(uv=uv, pip=pip, active=active, python="/my venv/python")
    assert found == (install, uninstall)


def test_this_environment_is_seen(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/uv")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    remedy = "uv pip uninstall mlx-cpu && uv pip install mlx  # and uv venv stays"
    assert installer.in_this_environment(remedy) == remedy
    monkeypatch.setenv("VIRTUAL_ENV", "/another")
    monkeypatch.setenv("CONDA_PREFIX", "/a/third")
    assert installer.in_this_environment(remedy).count(f"--python {sys.executable}") == 2
