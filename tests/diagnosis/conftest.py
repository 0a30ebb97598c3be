import pytest
from metal_stand_in import metal

from mlx_tune.diagnosis import installer

__all__ = ["metal"]


@pytest.fixture(autouse=True)
def remedies_as_they_are_written(monkeypatch):
    """Whatever installs on the machine that runs the tests, remedies say `uv pip`."""
    monkeypatch.setattr(installer, "commands", lambda **_: ("uv pip install", "uv pip uninstall"))
