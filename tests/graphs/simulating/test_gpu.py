"""Kernels that both kinds of GPU launch, and what is reused."""

from __future__ import annotations

import mlx.core as mx
import pytest
from gpu_effects import run

from mlx_tune.graphs import ArraySpec, estimate_memory
from mlx_tune.graphs.simulating.gpu import like
from mlx_tune.graphs.simulating.layouts import row_major, transpose

X = (64, 256)
SIZE = 2 * 64 * 256
TURNED = transpose((256, 64), row_major((256, 64)), (1, 0))
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "metal"])


@BACKENDS
@pytest.mark.parametrize(
    ("name", "arguments", "kernels"),
    [
        ("Transpose", ((1, 0),), 0),
        ("Reshape", (), 0),
        ("Sin", (), 1),
        ("AsType", (), 1),
        ("Full", (), 1),
        ("Sort", (), 1),
    ],
)
def test_views_launch_nothing(backend: str, name: str, arguments: tuple[object, ...], kernels: int) -> None:
    out = (256, 64) if name == "Transpose" else X
    assert run(backend, name, [X], [out], arguments=arguments)[2] == kernels


@BACKENDS
def test_a_copy_launches_nothing_where_the_buffer_is_handed_on(backend: str) -> None:
    assert run(backend, "AsType", [X], [X], donated=[0])[1:] == (0, 0)
    cast = run(backend, "AsType", [X], [X], donated=[0], dtypes=[mx.bfloat16, mx.float16])
    assert cast[1:] == (0, 1)
    assert run(backend, "Reshape", [X], [(256, 64)], layouts=[TURNED])[1:] == (SIZE, 1)
    assert run(backend, "SliceUpdate", [X, (1, 256)], [X])[2] == 2
    assert run(backend, "SliceUpdate", [X, (1, 256)], [X], donated=[0])[1:] == (0, 1)


@BACKENDS
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "RoPE"])
def test_norms_and_rotations_take_over_their_input(backend: str, name: str) -> None:
    other = (256,) if name != "RoPE" else ()
    shape = X if name != "RoPE" else (1, 2, 32, 256)
    assert run(backend, name, [shape, other], [shape])[1:] == (SIZE, 1)
    assert run(backend, name, [shape, other], [shape], donated=[0])[1:] == (0, 1)


@BACKENDS
def test_a_norm_of_columns_copies_first(backend: str) -> None:
    assert run(backend, "RMSNorm", [X, (256,)], [X], layouts=[TURNED], donated=[0])[1:] == (SIZE, 2)


@BACKENDS
def test_the_loss_s_gradient_takes_the_logits_place_if_it_may(backend: str) -> None:
    dtypes = [mx.float32, mx.int32, mx.float32, mx.float32, mx.float32]
    rows = [X, (64,), (64,), (64,)]
    assert run(backend, "CrossEntropy", rows[:2], [(64,)], dtypes=[mx.float32, mx.int32, mx.float32])[1:] == (256, 1)
    assert run(backend, "CrossEntropyVJP", rows, [X], dtypes=dtypes)[1:] == (2 * SIZE, 1)
    assert run(backend, "CrossEntropyVJP", rows, [X], dtypes=dtypes, donated=[0])[1:] == (0, 1)
    assert run(backend, "CrossEntropyVJP", rows, [X], dtypes=dtypes, layouts=[TURNED])[1:] == (2 * SIZE, 2)


@BACKENDS
def test_log_sum_exp_reads_rows(backend: str) -> None:
    assert run(backend, "LogSumExp", [X], [(64, 1)])[1:] == (128, 1)
    assert run(backend, "LogSumExp", [X], [(64, 1)], layouts=[TURNED])[1:] == (128 + SIZE, 2)


def test_a_layout_like_another_has_its_axes_in_the_same_order() -> None:
    shape = (2, 4, 128, 64)
    turned = transpose((2, 128, 4, 64), row_major((2, 128, 4, 64)), (0, 2, 1, 3))
    assert like(shape, turned).strides == turned.strides
    assert like(shape, row_major(shape)) == row_major(shape)


@BACKENDS
def test_what_a_convolution_holds_besides_is_said_not_to_be_known(backend: str) -> None:
    def step(x: mx.array, w: mx.array) -> mx.array:
        return mx.conv2d(x, w)

    shapes = ArraySpec((2, 16, 16, 8), mx.float32), ArraySpec((4, 3, 3, 8), mx.float32)
    assert estimate_memory(step, *shapes, backend=backend).unknown_operations == {"Convolution": 1}
    assert estimate_memory(step, *shapes, backend="cpu").unknown_operations == {}
