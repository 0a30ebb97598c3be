"""The longest row: the search by itself, and answers that hold in real steps."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs
from tiled_models import MLP, WIDTH

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.errors import BudgetError, InvalidArgumentError
from mlx_tune.lm.lengths.longest_sequence import _longest

VOCABULARY = 64


class Block(nn.Module):
    """Sums what came before, and an MLP that is wide."""

    def __init__(self):
        super().__init__()
        self.mixing, self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), MLP(24 * WIDTH)

    def __call__(self, x):
        x = x + self.mixing(mx.cumsum(x, axis=-2) / (1 + mx.arange(x.shape[-2])[:, None]))
        return x + self.mlp(x)


class Speaker(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = [Block() for _ in range(3)]
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def __call__(self, tokens):
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def speaker():
    mx.random.seed(0)
    model = Speaker()
    mx.eval(model.parameters())
    return model


def data(longest=2048):
    return [([1 + i % 60 for i in range(n)], 0) for n in (40, longest)]


@given(st.integers(0, 10**6), st.integers(1, 4000), st.floats(0, 1), st.integers(1, 5000), st.integers(0, 10**8))
def test_the_search_finds_the_longest_that_fits(base, slope, bend, most, allowed):
    looked = []

    def floor(length):
        looked.append(length)
        return int(base + slope * length + bend * length**2)

    length, needs = _longest(floor, allowed, most)
    assert all(1 <= at <= most for at in looked)
    assert len(looked) < 40
    if length:
        assert needs == int(base + slope * length + bend * length**2) <= allowed
        further = length + max(256, length // 8)
        assert length == most or further >= most or int(base + slope * further + bend * further**2) > allowed
    else:
        assert floor(min(33, most)) > allowed


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_lengths_are_those_whose_attention_is_fused(backend):
    """MLX's attention on CUDA is quadratic in memory where a row is no multiple of 128 tokens."""

    def floor(length):
        fused = backend == "cpu" or (length - 1) % 128 == 0
        return 1000 * length if fused else length**2 * 1000

    length, _ = _longest(floor, 10_000_000, 20_000)
    assert length % 128 == 1
    assert 9_600 < length <= 10_000


def budget_for(model, name, length):
    """What a step on one row of that length is predicted to need in one way."""
    args = TrainingArgs(batch_size=1, max_seq_length=length, grad_checkpoint=name != "plain")
    return lm.estimate_memory(model, data(length), args).floor_bytes


def test_everything_fits_without_more(speaker):
    answer = lm.longest_sequence(speaker, data(256), TrainingArgs(batch_size=1), budget="1GB")
    assert (answer.max_seq_length, answer.way.name) == (256, "plain")
    assert answer.truncation.startswith("no row cut")
    assert [way.name for way in answer.ways] == ["plain"]
    assert 0 < answer.peak_bytes <= answer.budget_bytes == answer.limit_bytes == 10**9


@pytest.mark.cpu_only  # on a GPU the step of a toy is one command buffer, whose buffers stay whatever the order
def test_more_is_done_where_rows_do_not_fit_and_a_step_confirms_it(speaker):
    budget = int(1.2 * budget_for(speaker, "plain", 256))
    before = dict(tree_flatten(speaker.parameters()))
    answer = lm.longest_sequence(speaker, data(), TrainingArgs(batch_size=1), budget=budget, tokens=64)
    by_name = {way.name: way.max_seq_length for way in answer.ways}
    assert 256 <= by_name["plain"] < by_name["checkpoint"] < by_name["checkpoint and tile"]
    assert answer.way.name == "checkpoint and tile"
    assert answer.max_seq_length > 2 * by_name["plain"]
    assert answer.peak_bytes <= budget
    assert all(way.predicted_bytes <= budget for way in answer.ways)
    assert "1 of 2 rows cut" in answer.truncation or answer.max_seq_length == 2048
    after = dict(tree_flatten(speaker.parameters()))
    assert all(mx.array_equal(after[name], before[name]) for name in before)
    assert not any(mt.is_tiled(part) or mt.is_checkpointed(part) for part in speaker.modules())
    text = str(answer)
    assert "measured" in text
    assert "longest row, predicted" in text
    assert json.loads(json.dumps(answer.to_dict()))["way"]["tokens"] == 64


def test_a_model_without_mlps_of_its_own_says_so():
    class Mixing(Speaker):
        def __init__(self):
            super().__init__()
            for layer in self.layers:
                layer.mlp = nn.Linear(WIDTH, WIDTH)
                layer.mixing = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1))

    model = Mixing()
    mx.eval(model.parameters())
    budget = 2 * budget_for(model, "checkpoint", 128)
    answer = lm.longest_sequence(model, data(4096), TrainingArgs(batch_size=1), budget=budget)
    assert [way.name for way in answer.ways] == ["plain", "checkpoint"]
    assert any("checkpoint and tile: " in note and "changing position" in note for note in answer.notes)


def test_what_is_asked_for_counts(speaker):
    answer = lm.longest_sequence(
        speaker, data(64), TrainingArgs(batch_size=2, grad_checkpoint=True), budget="1GB", max_length=96
    )
    assert (answer.max_seq_length, answer.batch_size, answer.way.name) == (96, 2, "checkpoint")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"budget": 1000}, BudgetError, "Not even a short row fits"),
        ({"max_length": 0}, InvalidArgumentError, "max_length"),
        ({"tokens": 0}, InvalidArgumentError, "tokens"),
    ],
)
def test_what_cannot_be(speaker, options, error, text):
    with pytest.raises(error, match=text):
        lm.longest_sequence(speaker, data(64), TrainingArgs(batch_size=1), **options)
    assert not any(mt.is_checkpointed(part) for part in speaker.modules())
