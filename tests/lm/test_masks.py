"""Masks of attention in training: "causal" and no array, but where an architecture makes its own."""

from __future__ import annotations

from pathlib import Path

import architectures
import mlx.core as mx
import mlx.optimizers as optim
import pytest
from architectures import NOT_TRIED, names
from mlx_lm.models.base import create_attention_mask
from toy_models import CONFIGS, build_model

from mlx_tune import lm

#: mlx-lm's architectures that make an array `[length, length]` of their own, however short the rows.
OWN = {
    "bailing_hybrid", "bailing_moe_v3", "deepseek_v3", "deepseek_v32", "deepseek_v41", "glm4_moe_lite", "glm_moe_dsa",
    "kimi_k25", "kimi_k3", "kimi_linear", "kimi_vl", "llama4", "longcat_flash", "longcat_flash_ngram",
}  # fmt: skip
#: Those that compute attention out of products.
UNFUSED = {"gemma2", "phi3small"}
#: Those without attention.
NONE = {"mamba", "mamba2", "rwkv7"}


@pytest.fixture
def masks(monkeypatch):
    """The masks that attention is given, "array" for arrays."""
    seen: list[str] = []
    attention = mx.fast.scaled_dot_product_attention

    def watched(*args, mask=None, **kwargs):
        seen.append("array" if isinstance(mask, mx.array) else str(mask))
        return attention(*args, mask=mask, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.cpu_only
def test_architectures_ask_for_a_causal_mask_and_make_no_array(masks) -> None:
    own, without = set(), set()
    for name in set(names()) - set(NOT_TRIED):
        masks.clear()
        try:
            model = architectures.toy(name)
        except ValueError:
            continue
        model.train()
        model(mx.ones((2, 40), mx.int32))
        if "array" in masks:
            own.add(name)
        elif not masks:
            without.add(name)
        else:
            assert set(masks) == {"causal"}, name
    assert own == OWN
    assert without == UNFUSED | NONE


def test_training_pads_to_the_right_and_masks_the_loss_alone(masks, toy, rows, arguments) -> None:
    """Rows of different lengths, with mlx-lm's loss and with the linear one."""
    for plain in (True, False):
        masks.clear()
        with lm.training_step(toy(lora=True), optim.SGD(1e-2), rows, arguments(), plain_loss=plain) as ready:
            batch, lengths = ready.make_batch(4)
            assert len({int(n) for n in lengths[:, 1]}) > 1
            mx.eval(ready.step((batch, lengths)))
        assert set(masks) == {"causal"}


def test_padding_to_the_right_changes_nothing_before_it() -> None:
    model = build_model(CONFIGS["tied"])
    tokens = mx.random.randint(1, 320, (2, 24))
    padded = mx.concatenate([tokens, mx.zeros((2, 8), mx.int32)], axis=1)
    other = mx.concatenate([tokens, mx.full((2, 8), 7)], axis=1)
    assert mx.array_equal(model(padded)[:, :24], model(other)[:, :24])


def test_windows_make_an_array_once_a_row_is_longer() -> None:
    assert create_attention_mask(mx.zeros((1, 8, 4)), window_size=8) == "causal"
    assert isinstance(create_attention_mask(mx.zeros((1, 9, 4)), window_size=8), mx.array)


def test_the_guide_names_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "guides" / "fine-tune.md").read_text()
    assert f"{len(OWN)} make an array of their own" in text
    assert all(f"`{name}`" in text for name in OWN | UNFUSED)
