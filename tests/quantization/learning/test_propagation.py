from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import quantization_toys as toys
from block_models import make, quantized, tokens
from mlx.utils import tree_flatten

from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.quantization.learning import drift_correction
from mlx_tune.quantization.learning import gptq_model as passes
from mlx_tune.quantization.learning.kept_arrays import KeptArrays
from mlx_tune.quantization.learning.propagation import Propagation
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.interception import forward_steps
from mlx_tune.quantization.models.sites import WalkedModel


def test_layers_that_are_given_the_same_are_one_stage():
    model = toys.llama(dtype=mx.float32)
    batches = read_batches([mx.random.randint(0, 64, (2, 17))], "calibration")
    modules = dict(model.named_modules())
    layers = {path: m for path, m in modules.items() if isinstance(m, nn.Linear)}
    steps = forward_steps(partial(batches[0].inputs.call, model), list(layers.items()), blocks_of(model))
    inputs = Propagation(WalkedModel(model), batches, steps, lambda _: nullcontext(), {}, KeptArrays(1 << 30))
    step = next(s for s in steps if s.path == "model.layers.0")
    inputs.enter(step)
    mine = {path: m for path, m in layers.items() if path.startswith("model.layers.0.")}
    stages = [sorted(path.rpartition(".")[2] for path in stage) for stage in inputs.stages(step, mine)]
    assert stages == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_one_large_batch_is_as_good_as_many_small_ones(monkeypatch):
    monkeypatch.setattr(passes, "_PART_TOKENS", 4 * 17)
    many = tokens(10)
    one = read_batches([mx.concatenate([batch.tokens for batch in many])], "calibration")
    found = []
    for calibration in (many, one):
        model = make()
        done = quantized(model, 3, calibration)
        found.append((done, model.layers[2].two.weight))
    assert found[0][0] == found[1][0]
    assert mx.array_equal(found[0][1], found[1][1]).item()


def test_both_ways_of_running_blocks_learn_the_same(monkeypatch):
    """Calling blocks one after the other sees what running the whole, partly quantized model would show."""
    # How far inputs have moved, and what layers of the same block hand on, is known in one of both ways only.
    monkeypatch.setattr(drift_correction, "_SHARE", 0)
    monkeypatch.setattr(Propagation, "stages", lambda self, step, modules: [list(modules)])
    found = []
    for chained in (True, False):
        model = make(chained)
        quantized(model, 4, tokens(3))
        found.append(dict(tree_flatten(model.parameters())))
    for name, array in found[0].items():
        if "scales" in name:
            assert mx.allclose(array, found[1][name], rtol=1e-2, atol=1e-3).item(), name


def arrays_of(model):
    return dict(tree_flatten(model.parameters()))


def test_what_waits_on_disk_or_is_computed_again_leaves_the_same_weights(monkeypatch):
    found, on_disk = [], []
    plain = KeptArrays.save
    monkeypatch.setattr(KeptArrays, "save", lambda self, arrays: on_disk.append(arrays) or plain(self, arrays))
    for share, room in ((4, None), (1 << 60, None), (4, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(passes, "_SHARE_OF_MEMORY", share)
            if room is not None:
                patch.setattr(KeptArrays, "room_bytes", lambda self, on_disk: 0)
            model = make()
            quantized(model, 3, tokens(3))
            found.append(arrays_of(model))
        assert bool(on_disk) == (share > 4)
        on_disk.clear()
    for name, array in found[0].items():
        assert mx.array_equal(array, found[1][name]).item(), name
        assert mx.array_equal(array, found[2][name]).item(), name


def test_nothing_is_kept_longer_than_its_block(monkeypatch):
    most, put = [], KeptArrays.__setitem__
    monkeypatch.setattr(KeptArrays, "room_bytes", lambda self, on_disk: 0)  # so that no block is run ahead of the rest

    def counting(self, key, array):
        put(self, key, array)
        most.append(sum(x.nbytes for x in self._held.values()))

    monkeypatch.setattr(KeptArrays, "__setitem__", counting)
    quantized(make(), 4, tokens(2))
    state = 2 * 4 * 16 * 128 * 4  # batches, rows, tokens, width, bytes
    assert max(most) <= 6 * state  # the inputs of a block and of its two layers, now and before
