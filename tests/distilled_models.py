"""A model and its quantized copy, for training one against the other."""

import copy

import mlx.core as mx
import mlx.nn as nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def __call__(self, x):
        return x + self.two(nn.relu(self.one(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = [Block() for _ in range(2)]

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.as_linear(x)


def pair_of_models(bits=3, group_size=32):
    mx.random.seed(0)
    reference = Tied()
    reference.set_dtype(mx.bfloat16)
    mx.eval(reference.parameters())
    model = copy.deepcopy(reference)
    nn.quantize(model, group_size, bits)
    return model, reference
