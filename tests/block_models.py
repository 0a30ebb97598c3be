"""Small models of blocks, for what is learned block by block."""

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.learning.gptq_model import gptq_model
from mlx_tune.quantization.methods import install
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel


class Block(nn.Module):
    def __init__(self, dims=128):
        super().__init__()
        self.one, self.two = nn.Linear(dims, dims), nn.Linear(dims, dims)

    def __call__(self, x, mask=None):
        return x + self.two(nn.relu(self.one(x)))


class Tied(nn.Module):
    """A toy language model: blocks in a list, a tied embedding; `chained=False` works on x between the blocks."""

    def __init__(self, chained=True, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(40, 128)
        self.layers = [Block() for _ in range(blocks)]
        self.unused = nn.Linear(128, 128)
        self.chained = chained

    def __call__(self, tokens):
        x = self.embed(tokens)
        mask = mx.zeros((1,))
        for layer in self.layers:
            x = layer(x, mask) if self.chained else layer(x * 1.0, mask)
        return self.embed.as_linear(x)


def tokens(count=8, rows=4):
    mx.random.seed(3)
    return read_batches([mx.random.randint(0, 40, (rows, 17)) for _ in range(count)], "calibration")


def make(chained=True):
    mx.random.seed(0)
    model = Tied(chained)
    mx.eval(model.parameters())
    return model


def quantized(model, bits, batches):
    """Quantize a model by GPTQ, in groups of 64; what became of each layer."""
    layers = plan_quantization(model, bits, 64).layers
    return gptq_model(WalkedModel(model), layers, batches, install=install, blocks=blocks_of(model))
