from __future__ import annotations

import dataclasses
import json

import mlx.core as mx
import pytest
from mlx_lm.tuner.trainer import TrainingArgs
from workload_models import configuration

import mlx_tune as mt
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.capacity.answer import fits
from mlx_tune.lm.capacity.unloaded import Unloaded
from mlx_tune.lm.preparation import StandInRows
from mlx_tune.machines.table import find_machine
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN

CONFIG = configuration("llama", num_hidden_layers=6)


def floor(rows: int, length: int, checkpoint: bool, plain: bool) -> int:
    model = mt.lm.add_adapters(Unloaded(CONFIG).build(), num_layers=-1)
    args = TrainingArgs(batch_size=rows, max_seq_length=length, grad_checkpoint=checkpoint)
    rows_of_data = StandInRows(1 << 20, length, 512)
    return mt.lm.estimate_memory(model, rows_of_data, args, plain_loss=plain, backend="cpu").floor_bytes


@pytest.mark.parametrize("budget", ["30MB", "300MB"])
def test_the_answers_are_the_largest_that_fit(budget):
    # On a CPU: where a GPU's command buffers end shifts with the size, by less than the margin.
    machine = dataclasses.replace(find_machine("Mac 16GB"), backend="cpu")
    answer = fits(CONFIG, budget=budget, machine=machine, max_seq_length=128)
    assert answer.fits
    room = answer.budget_bytes / (1 + ESTIMATE_MARGIN)
    for way in answer.rows:
        ways = way.way.startswith("checkpointed"), "linear" not in way.way
        assert way.floor_bytes == floor(1, 128, *ways)
        assert floor(way.largest_batch, 128, *ways) <= room < floor(way.largest_batch + 1, 128, *ways)
        if not way.row_limited:
            assert floor(1, way.longest_row, *ways) <= room < floor(1, way.longest_row + 32, *ways)


def test_the_answer_is_a_sentence_and_json_and_predicted():
    answer = fits(CONFIG, machine="M1 8GB", max_seq_length=128, batch_size=4)
    text = str(answer)
    assert text.startswith("LoRA of llama fits M1 8 GB: batch 4 at 128 tokens, plain, peaks at ")
    assert "Every figure is predicted" in text
    plain = json.loads(json.dumps(answer.to_dict()))
    assert plain["predicted"] is plain["fits"] is True
    assert {row["way"] for row in plain["rows"]} >= {"plain", "checkpointed"}
    assert plain["floor_bytes"] <= plain["peak_bytes"] <= plain["budget_bytes"]
    assert plain["machine"]["name"] == "M1 8 GB"


def test_nothing_is_evaluated_and_the_random_stream_stays():
    mx.random.seed(7)
    state, active = mx.random.state[0].tolist(), mx.get_active_memory()
    fits(CONFIG, machine="M1 8GB", max_seq_length=64)
    assert mx.random.state[0].tolist() == state
    assert mx.get_active_memory() - active < 1e5


def test_too_small_a_budget_says_what_would_do():
    answer = fits(CONFIG, budget="12MB", machine="Mac 8GB", max_seq_length=512, batch_size=16)
    assert not answer.fits
    assert "does not fit Mac 8 GB" in answer.answer
    assert "a Mac with 8 GB does" in answer.answer
    assert "tokens do at batch 1" in answer.answer


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": "1MB"}, "The weights of llama alone take .* gives 1.00 MB"),
        ({"machine": "M9 Ultra 1TB"}, "is not in the table"),
        ({"machine": "M1 8GB", "memory": "8GB"}, "both name a machine"),
        ({"bits": 4, "model": CONFIG | {"quantization": {"bits": 8, "group_size": 64}}}, "quantized already"),
        ({"model": CONFIG | {"model_type": "nobody"}}, "does not know this architecture"),
        ({"fine_tune_type": "prefix"}, "fine_tune_type='prefix': it is one of lora, dora, full"),
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 0}, "rank=0"),
        ({"max_seq_length": 1}, "max_seq_length=1"),
        ({"num_layers": 99}, "num_layers=99: the model has 6 blocks"),
    ],
)
def test_bad_input_is_refused(options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        fits(**{"model": CONFIG, "max_seq_length": 64} | options)


def test_a_row_beyond_the_models_own_limit_is_said():
    answer = fits(CONFIG, machine="Mac 8GB", max_seq_length=1024)
    assert any("allows 512 tokens" in note for note in answer.notes)
    assert all(way.longest_row == 512 and way.row_limited for way in answer.rows)


def test_a_machine_is_priced_for_its_own_backend():
    floors = {name: fits(CONFIG, machine=name, max_seq_length=512).floor_bytes for name in ("Mac 16GB", "RTX 4090")}
    assert len(set(floors.values())) == 2


def test_a_loss_that_needs_all_logits_has_no_row_and_says_why(monkeypatch):
    from mlx_tune.lm.capacity import answer

    chosen = answer.choose_loss
    monkeypatch.setattr(answer, "choose_loss", lambda model: chosen(model, plain=True))
    found = fits(CONFIG, machine="Mac 16GB", max_seq_length=64)
    assert [way.way for way in found.rows] == ["plain", "checkpointed"]
    assert any("all logits are held" in note for note in found.notes)
