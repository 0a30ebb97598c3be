"""Every architecture of mlx-lm: the page says how it is split, and where it is, head and rest give its logits."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from architectures import NOT_TRIED, names, page, toy

from mlx_tune.losses.splitting import SplitHead, split_head

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
#: These make logits without a layer, or write to some of them.
NOT_SPLIT = {"talkie", "phi3small"}
TOKENS = mx.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


@pytest.mark.cpu_only
def test_the_page_is_made_from_the_models() -> None:
    assert PAGE.read_text() == page(), "run python docs/make_architectures_page.py"


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", [name for name in names() if name not in NOT_TRIED])
def test_head_and_rest_give_the_logits_of_the_model(name: str) -> None:
    mx.random.seed(0)
    model = toy(name, tied=False)
    split = split_head(model)
    assert isinstance(split, SplitHead) or name in NOT_SPLIT, split
    if isinstance(split, SplitHead):
        expected = model(TOKENS).astype(mx.float32)
        found = split.logits(split.states(model, TOKENS))
        assert mx.abs(found - expected).max().item() <= 1e-5 * mx.abs(expected).max().item()
