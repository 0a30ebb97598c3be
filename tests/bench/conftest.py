import pytest

from mlx_tune.wiring import context
from mlx_tune.wiring.ledger import Ledger


@pytest.fixture(autouse=True)
def own_ledger(monkeypatch, tmp_path):
    """A sweep that is wired on a Mac shares with other processes: here with none, and in no later test."""
    own = Ledger(tmp_path / "ledger")
    monkeypatch.setattr(context, "ledger", own)
    yield own
    own._forget()
