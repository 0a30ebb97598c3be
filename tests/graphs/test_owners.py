"""Whose an array is: what the owners of a peak say about modules and parameters."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import mlx_tune as mt
from mlx_tune.graphs import MemoryEstimate, PeakOwner, estimate_memory
from mlx_tune.graphs.owners import modules_of
from mlx_tune.graphs.simulating.order import evaluation_order
from mlx_tune.graphs.tracing.trace import trace_step


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, hidden), nn.Linear(hidden, 8)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(nn.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, *hidden: int) -> None:
        super().__init__()
        self.blocks = [Block(h) for h in hidden]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = block(x)
        return x


def training(*hidden: int) -> tuple[Model, optim.Optimizer, Any]:
    model, optimizer = Model(*hidden), optim.Adam(1e-3)
    optimizer.init(model.trainable_parameters())

    def step(x: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, lambda model, x: model(x).square().mean())(model, x)
        optimizer.update(model, gradients)
        return loss

    return model, optimizer, step


@pytest.mark.parametrize("how", ["plain", "checkpointed", "compiled"])
def test_every_product_belongs_to_the_layer_whose_weight_it_uses_or_whose_gradient_it_is(how: str) -> None:
    model, optimizer, step = training(24, 32)  # the sizes tell the layers apart
    if how == "checkpointed":
        mt.checkpoint_blocks(model)
    elif how == "compiled":
        held = [model.state, optimizer.state]
        step = mx.compile(step, inputs=held, outputs=held)
    graph = trace_step(step, (mx.zeros((5, 8)),), (model, optimizer))
    order = evaluation_order(graph)
    modules = modules_of(graph, order)
    products = [node for node in (graph.nodes[i] for i in order) if node.name in ("Matmul", "AddMM")]
    assert len(products) >= 11  # forward, for the weight and, but for the first, for the input
    for node in products:
        sizes = {size for value in (*node.inputs, *node.outputs) for size in graph.values[value].shape}
        block = 0 if 24 in sizes else 1
        hidden = 24 if block == 0 else 32
        for value in node.outputs:
            shape = graph.values[value].shape
            path = modules[value]
            assert path.startswith(f"blocks.{block}."), (node.name, shape, path)
            if node.name == "AddMM":
                assert path == f"blocks.{block}.{'up' if shape[-1] == hidden else 'down'}"


def test_parameters_updates_and_batches_are_named_by_where_they_stand() -> None:
    model, optimizer, step = training(24)
    estimate = estimate_memory(step, {"x": mx.zeros((5, 8))}["x"], state=(model, optimizer))
    labels = {owner.label for owner in estimate.peak_owners if not owner.operation}
    assert {"blocks.0.up.weight", "optimizer.blocks.0.up.weight.m", "args[0]"} <= labels


def owners(*made: tuple[str, str, str, str]) -> MemoryEstimate:
    """An estimate with these owners: operation, purpose, label and module."""
    peak = tuple(PeakOwner(1000, (5, 8), "float32", *owner) for owner in made)
    return MemoryEstimate(
        floor_bytes=1000 * len(peak),
        start_bytes=0,
        end_bytes=0,
        by_purpose={"activations": 1000 * len(peak)},
        peak_owners=peak,
        live_bytes=(1000 * len(peak),),
        live_by_purpose={},
        operations=("Add",),
        peak_operation=0,
        compiled=False,
        stand_ins={},
        unknown_operations={},
        trace_seconds=0.1,
    )


def test_the_same_place_of_several_blocks_is_one_row() -> None:
    made = [("AddMM", "activations", "", f"blocks.{i}.up.0") for i in range(3)]
    estimate = owners(
        *made, ("AddMM", "activations", "", "blocks.1.down"), ("", "parameters", "blocks.1.w", "blocks.1")
    )
    rows = {owner.place: (owner.label, count) for owner, count in estimate.largest_owners()}
    assert rows == {"blocks.*.up.0": ("", 3), "blocks.1.down": ("", 1), "parameters": ("blocks.1.w", 1)}
    assert "[5, 8] float32 x 3, blocks.*.up.0" in str(estimate)


def test_what_is_no_activation_says_what_it_is_for() -> None:
    estimate = owners(
        ("Convolution", "temporaries", "", "layers.0"),
        ("Multiply", "updates", "layers.0.weight", "layers.0"),
        ("Full", "activations", "", ""),
    )
    places = [owner.place for owner in estimate.peak_owners]
    assert places == ["temporaries of layers.0", "updates of layers.0.weight", "activations"]


def test_two_models_of_one_kind_are_told_apart() -> None:
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    estimate = estimate_memory(lambda x: other(one(x)), mx.zeros((2, 8)), state=(one, other))
    labels = {owner.label for owner in estimate.peak_owners}
    assert {"state[0].weight", "state[1].weight"} <= labels
