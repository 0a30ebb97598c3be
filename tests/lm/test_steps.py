from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset, TextDataset

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.lm.steps import as_rows, largest_batch, longest_batches, row_of

ONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def ranks(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def weights(model) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in tree_flatten(model.parameters())}


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


@pytest.mark.parametrize("longest", [1, 31, 32, 33, 64, 70, 97, 200])
@pytest.mark.parametrize("max_length", [32, 65, 96, 2048])
def test_no_batch_of_mlx_lm_is_longer_than_the_longest(longest: int, max_length: int) -> None:
    data = [([1] * n, 0) for n in (5, longest, 3, max(1, longest - 1))]
    make_batch = longest_batches(data, max_length, ONE)
    assert make_batch.length == min(32 * -(-min(longest, max_length) // 32) + 1, max_length)
    for n in (1, 2, 4):
        tokens, lengths = make_batch(n)
        assert tokens.shape == (n, make_batch.length)
        assert lengths.shape == (n, 2)
        met = max(batch.shape[1] for batch, _ in trainer.iterate_batches(data, n, max_length))
        assert met <= make_batch.length
    assert max(b.shape[1] for b, _ in trainer.iterate_batches(data, 1, max_length)) == make_batch.length


def test_the_longest_batch_holds_the_longest_rows_with_their_offsets() -> None:
    data = [([n] * n, n // 2) for n in (4, 40, 12, 30)]
    tokens, lengths = longest_batches(data, 2048, ONE)(2)
    assert sorted(lengths.tolist()) == [[15, 30], [20, 40]]
    assert sorted(int(row.max()) for row in np.array(tokens)) == [30, 40]


def test_a_row_that_fills_the_length_ends_the_search() -> None:
    asked = []

    class Rows(list):
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)

    make_batch = longest_batches(Rows([([1] * 50, 0)] * 100), 48, ONE)
    assert asked == [0]
    assert make_batch(3)[0].shape == (3, 48)


def test_each_rank_gets_its_share_of_the_rows() -> None:
    data = [([n] * n, 0) for n in (20, 21, 22, 23)]
    parts = [longest_batches(data, 2048, ranks(2, rank))(4) for rank in range(2)]
    assert [tokens.shape for tokens, _ in parts] == [(2, 33)] * 2
    assert sorted(int(length) for _, lengths in parts for length in lengths[:, 1]) == [20, 21, 22, 23]
    with pytest.raises(mt.InvalidArgumentError, match="3 rows does not divide among 2 ranks"):
        longest_batches(data, 2048, ranks(2, 0))(3)


def test_rows_come_in_either_of_mlx_lms_forms() -> None:
    assert row_of(([1, 2, 3], 2)) == ([1, 2, 3], 2)
    assert row_of([1, 2, 3]) == ([1, 2, 3], 0)
    assert row_of([1, 2]) == ([1, 2], 0)  # two tokens are no pair of tokens and offset


def test_a_data_set_is_tokenized_as_mlx_lm_does() -> None:
    tokenizer = SimpleNamespace(encode=lambda text: [ord(c) for c in text], eos_token_id=0)
    rows = as_rows(TextDataset([{"text": "ab"}, {"text": "c"}], tokenizer))
    assert isinstance(rows, CacheDataset)
    assert rows[0] == ([97, 98, 0], 0)
    assert as_rows(rows) is rows


def test_largest_batch_keeps_to_both_data_sets_and_the_ranks() -> None:
    assert largest_batch(range(10), None, 1) == 10
    assert largest_batch(range(10), range(7), 2) == 6
    with pytest.raises(mt.InvalidArgumentError, match="1 rows are too few for 2 ranks"):
        largest_batch(range(10), range(1), 2)


@pytest.mark.cpu_only
def test_steps_train_exactly_as_mlx_lm_does(toy, rows, tmp_path) -> None:
    args = trainer.TrainingArgs(batch_size=4, iters=3, adapter_file=tmp_path / "a.safetensors", max_seq_length=64)
    theirs = toy(lora=True)
    np.random.seed(0)
    trainer.train(theirs, optim.AdamW(1e-2), rows, args=args)

    ours, optimizer = toy(lora=True), optim.AdamW(1e-2)
    np.random.seed(0)
    batches = trainer.iterate_batches(rows, 4, 64, loop=True)
    with lm.training_step(ours, optimizer, rows, args, plain_loss=True) as ready:
        for _ in range(3):
            mx.eval(ready.step(next(batches)), ours.state, optimizer.state)
    assert same(weights(ours), weights(theirs))


def test_the_block_leaves_optimizer_and_training_flags_as_they_were(toy, rows) -> None:
    model, optimizer = toy(lora=True), optim.Adam(1e-3)
    model.eval()
    model.layers[1].train()
    keys = set(optimizer.state)
    with lm.training_step(model, optimizer, rows, trainer.TrainingArgs()) as ready:
        assert all(module.training for module in model.modules())
        assert set(optimizer.state) > keys
        assert ready.max_batch == len(rows)
        assert ready.multiple_of == 1
    assert set(optimizer.state) == keys
    assert not model.training
    assert model.layers[1].training
    assert not model.layers[0].training


def test_a_block_checkpointed_in_between_takes_effect(toy, rows) -> None:
    model = toy(lora=True)
    calls = []
    plain = type(model.layers[0]).__call__

    class Counted(type(model.layers[0])):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return plain(self, *args, **kwargs)

    for layer in model.layers:
        layer.__class__ = Counted
    with lm.training_step(model, optim.AdamW(1e-2), rows, trainer.TrainingArgs()) as ready:
        batch = ready.make_batch(2)
        counts = []
        for checkpointed in (False, True, False):
            handle = mt.checkpoint_blocks(model) if checkpointed else None
            calls.clear()
            mx.eval(ready.step(batch), model.state)
            counts.append(len(calls))
            calls.clear()
            mx.eval(ready.step(batch), model.state)
            assert not calls  # compiled: Python runs once
            if handle is not None:
                handle.undo()
    assert counts == [3, 6, 3]


def test_with_accumulation_the_step_holds_kept_gradients(toy, rows) -> None:
    model = toy()
    floors = [
        lm.estimate_memory(model, rows, trainer.TrainingArgs(batch_size=1, grad_accumulation_steps=steps)).floor_bytes
        for steps in (1, 2)
    ]
    size = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    assert floors[1] - floors[0] > 0.9 * size


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows": []}, "data set has no rows"),
        ({"rows": [([], 0)]}, "longest row of the data set has no tokens"),
        ({"accumulation": 0}, "grad_accumulation_steps=0: it must be at least 1"),
        ({"frozen": True}, "nothing to train"),
    ],
)
def test_bad_input_is_named(toy, rows, change, text) -> None:
    model = toy()
    if change.get("frozen"):
        model.freeze()
    args = trainer.TrainingArgs(grad_accumulation_steps=change.get("accumulation", 1))
    with (
        pytest.raises(mt.InvalidArgumentError, match=text),
        lm.training_step(model, optim.SGD(1e-3), change.get("rows", rows), args),
    ):
        pass
