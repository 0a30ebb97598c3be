from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.judging.evaluation import Watched
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.sizing.coverage import measure_coverage
from mlx_tune.quantization.sizing.late_starts import LateStarts
from mlx_tune.quantization.sizing.sensitivity import measure_divergences
from mlx_tune.substitution import ModuleCall, intercepted


class Jumping(nn.Module):
    """Blocks one after the other, of which the first also reaches the end by another way."""

    def __init__(self, jump: bool) -> None:
        super().__init__()
        self.embedding, self.jump = nn.Embedding(96, 128), jump
        self.layers = [nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(3)]
        self.head = nn.Linear(128, 96)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens)
        first = None
        for layer in self.layers:
            x = layer(x)
            first = x if first is None else first
        return self.head(x + first if self.jump else x)


def both_ways(model: nn.Module, **kwargs) -> tuple[dict, dict, Counter, int]:
    """Divergences with late starts and with whole runs, the blocks' calls of the former, and the batches."""
    plan = mt.plan_quantization(model, 3, 64, method="nearest", **kwargs)
    walked, blocks = WalkedModel(model), blocks_of(model)
    batches = read_batches([toys.tokens(2, 17, seed=i) for i in range(2)], "calibration")
    names, calls = {id(block): path for path, block in blocks}, Counter()

    def count(call: ModuleCall) -> object:
        calls[names[id(call.module)]] += 1
        return call.run()

    def measured(divergence) -> dict:
        return measure_divergences(plan.layers, lambda _: Format(3, 64), divergence, method="nearest")

    _, steps = measure_coverage(walked, plan.layers, batches, blocks)
    with Watched(walked, batches) as divergence:
        plain = measured(lambda _: divergence())
        with (
            LateStarts(steps, blocks, divergence) as late,
            intercepted([block for _, block in blocks], count),
        ):
            found = measured(late.divergence)
    return found, plain, calls, len(batches)


@pytest.mark.parametrize("tied", [True, False])
def test_late_starts_measure_the_same_with_fewer_blocks_run(tied: bool) -> None:
    found, plain, calls, batches = both_ways(toys.llama(tied=tied, num_hidden_layers=4))
    assert found == {path: pytest.approx(figures, rel=1e-5) for path, figures in plain.items()}
    # Seven layers in each block; the embedding runs all blocks, the output layer none.
    each = [int(path.rpartition(".")[2]) for path in sorted(calls)]
    assert [calls[path] for path in sorted(calls)] == [batches * (7 * (i + 1) + 1) for i in each]


@pytest.mark.parametrize("jump", [True, False])
def test_a_block_that_is_needed_elsewhere_is_run(jump: bool) -> None:
    mx.random.seed(0)
    found, plain, calls, _ = both_ways(Jumping(jump))
    assert found == {path: pytest.approx(figures, rel=1e-5) for path, figures in plain.items()}
    assert all(moved > 0 for moved, _ in found.values())
    whole_runs = sorted(calls.values())[0] > 4
    assert whole_runs == jump


def test_models_without_blocks_run_as_a_whole() -> None:
    model = nn.Sequential(nn.Embedding(96, 128), nn.Linear(128, 96))
    found, plain, _, _ = both_ways(model)
    assert found == plain
