from __future__ import annotations

import dataclasses

from mlx_tune.lm.capacity.result import Fits, TrainingWay
from mlx_tune.machines.table import find_machine


def way(name: str, gigabytes: float, largest: int, longest: int, *, fits: bool) -> TrainingWay:
    return TrainingWay(name, int(gigabytes * 1e9), int(gigabytes * 1.03e9), fits, largest, longest, False)


ANSWER = Fits(
    model="Toy-8B",
    bits=4,
    weights_bytes=4_500_000_000,
    fine_tune_type="lora",
    batch_size=1,
    max_seq_length=2048,
    machine=find_machine("Mac 32GB"),
    rows=(way("plain", 22, 0, 1024, fits=False), way("checkpointed", 8, 5, 9984, fits=True)),
    extrapolated=True,
    seconds=1.5,
)


def test_the_first_way_that_fits_is_chosen():
    assert ANSWER.chosen.way == "checkpointed"
    assert (ANSWER.floor_bytes, ANSWER.largest_batch, ANSWER.longest_row) == (8_000_000_000, 5, 9984)
    assert ANSWER.answer == (
        "LoRA of Toy-8B at 4 bits fits Mac 32 GB: batch 1 at 2,048 tokens, checkpointed, peaks at 8.24 GB of 20.6 GB. "
        "At that length checkpointed up to batch 5. The longest row is 9,984 tokens."
    )


def test_where_none_fits_the_leanest_speaks():
    rows = (way("plain", 40, 0, 512, fits=False), way("checkpointed", 30, 0, 1024, fits=False))
    answer = dataclasses.replace(ANSWER, rows=rows, fine_tune_type="full", bits=None)
    assert not answer.fits
    assert answer.answer == (
        "Full fine-tuning of Toy-8B does not fit Mac 32 GB: batch 1 at 2,048 tokens needs 30.9 GB (checkpointed), and "
        "20.6 GB can be used. Rows of up to 1,024 tokens do at batch 1, checkpointed; a Mac with 48 GB does."
    )


def test_the_table_marks_rules_and_limits():
    limited = dataclasses.replace(ANSWER.rows[1], row_limited=True)
    text = str(dataclasses.replace(ANSWER, rows=(limited,), machine=find_machine("M3 Max 48GB")))
    assert "9,984+" in text
    assert "by rule, not read" in text
    assert "fewer of the same blocks" in text
    assert "read there" in str(ANSWER)
