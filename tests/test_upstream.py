"""MLX still does what it does not promise and `mlx_tune.upstream` rests on; one test for each entry.

A failure says in its last line which entry to look at, and where MLX's own source is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_tune import upstream
from mlx_tune.graphs.tracing.built_graph import BuiltGraph


def broken(entry: str, source: str, expected: str) -> str:
    """The sentence of a failure."""
    return (
        f"MLX {version('mlx')} changed what mlx_tune.upstream.{entry} rests on ({source}, checked on "
        f"{', '.join(upstream.CHECKED)}): {expected}."
    )


def double(x: mx.array) -> mx.array:
    return x * 2


def loss(x: mx.array) -> mx.array:
    return (x * x).sum()


def given_a_gradient() -> Any:
    function = mx.custom_function(double)
    function.vjp(loss)
    return function


TRANSFORMED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "compile": (lambda: mx.compile(double), double, "compile"),
    "compile with state": (lambda: mx.compile(double, inputs=[mx.array(1.0)], outputs=[]), double, "compile"),
    "checkpoint": (lambda: mx.checkpoint(double), double, "unknown"),
    "grad": (lambda: mx.grad(loss), loss, "unknown"),
    "value_and_grad": (lambda: mx.value_and_grad(loss), loss, "unknown"),
    "vmap": (lambda: mx.vmap(double), double, "transform"),
    "vmap with axes": (lambda: mx.vmap(double, in_axes=1, out_axes=1), double, "transform"),
    "custom_function": (lambda: mx.custom_function(double), double, "unknown"),
    "custom_function with a gradient": (given_a_gradient, double, "transform"),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed_functions(name: str) -> None:
    make, inside, kind = TRANSFORMED[name]
    made = make()
    source = "python/src/mlx_func.cpp and python/src/transforms.cpp"
    assert type(made) in upstream.TRANSFORMED, broken("TRANSFORMED", source, f"mx.{name} gives {type(made)}")
    assert upstream.function_of(made) is inside, broken(
        "function_of", source, f"the function inside mx.{name} is the first or the last that it holds"
    )
    assert upstream.transformation_kind(made) == kind, broken(
        "kind_of", source, f"mx.{name} holds {[type(held).__name__ for held in upstream.referents(made)]}"
    )
    is_custom = isinstance(made, mx.custom_function)
    assert (type(made) is upstream.FUNCTION) is not is_custom, broken("FUNCTION", source, f"mx.{name} is another type")


def test_the_state_of_compiled_functions() -> None:
    inputs, outputs = [mx.array(1.0)], {"a": mx.array(2.0)}
    found = upstream.state_of(mx.compile(double, inputs=inputs, outputs=outputs))
    assert list(map(id, found)) == [id(inputs), id(outputs)], broken(
        "state_of", "python/src/transforms.cpp, mx.compile", "inputs= and outputs= are the first that it holds"
    )


def test_the_gradient_of_a_custom_function() -> None:
    held = upstream.referents(given_a_gradient())
    assert held == [double, loss], broken(
        "referents", "python/src/transforms.cpp, py_custom_function_tp_traverse", "its function and then its vjp"
    )


def test_calls_of_transformed_functions_can_be_intercepted() -> None:
    original = upstream.FUNCTION.__call__
    seen = []
    function = mx.compile(double)
    try:
        upstream.FUNCTION.__call__ = lambda self, *args: seen.append(self) or original(self, *args)  # type: ignore
        assert function(mx.array(2.0)).item() == 4.0
    finally:
        upstream.FUNCTION.__call__ = original  # type: ignore[method-assign, misc]
    assert seen == [function], broken("FUNCTION", "python/src/mlx_func.cpp", "its __call__ can be replaced")


DRAWING = "mlx/graph_utils.cpp, export_to_dot"


def test_drawings_of_graphs() -> None:
    x, y = mx.array(1.0), mx.array(2.0)
    z = mx.sin(x) + y
    parts = mx.split(mx.zeros((4,)) + z, 2)
    drawn = upstream.drawing(*parts, x=x, z=z)
    operations = list(upstream.operations_in(drawn))
    made = {name: outputs for _, _, outputs in operations for name in outputs}
    by_name = {name: (read, outputs) for name, read, outputs in operations}
    assert "x" in upstream.leaves_in(drawn), broken("leaves_in", DRAWING, "an array that is there is drawn as a source")
    assert "z" in made, broken("drawing", DRAWING, "an array has the name that it is given")
    assert by_name["Sin"][0] == ["x"], broken("operations_in", DRAWING, f"Sin reads x, and the text is {drawn}")
    split = next(((read, outputs) for name, read, outputs in operations if len(outputs) == 2), None)
    assert split is not None, broken("operations_in", DRAWING, f"Split makes two arrays, and the text is {drawn}")
    known = set(upstream.leaves_in(drawn))
    for name, read, outputs in operations:
        assert known.issuperset(read), broken("operations_in", DRAWING, f"{name} comes after what it reads")
        known.update(outputs)


def test_drawings_evaluate_nothing_and_tell_what_is_lazy() -> None:
    x = mx.array([1.0]) + 1
    entry = broken("is_lazy", DRAWING, "an evaluated array has no operation in its drawing, a lazy one has")
    assert upstream.is_lazy(x), entry
    assert upstream.is_lazy(x), entry
    mx.eval(x)
    assert not upstream.is_lazy(x), entry


def test_drawings_take_any_number_of_arrays_behind_one() -> None:
    leaves = [mx.array(float(i)) for i in range(3000)]
    built = BuiltGraph([], [mx.sin(leaf) for leaf in leaves])
    assert len(built.outputs) == 3000, broken("drawing", DRAWING, "arrays behind an operation are drawn, however many")


def test_operations_that_are_known_by_name() -> None:
    checkpointed = BuiltGraph([], [mx.checkpoint(double)(mx.array(1.0))])
    stopped = BuiltGraph([], [mx.stop_gradient(mx.array(1.0) + 1)])
    names = (checkpointed.nodes[-1].name, stopped.nodes[-1].name)
    assert names == ("CustomTransforms", "StopGradient"), broken(
        "operations_in", "mlx/primitives.h", f"mx.checkpoint and mx.stop_gradient are drawn as {names}"
    )


MODULES = "python/mlx/nn/layers/base.py, Module.__init__"


def test_the_mode_of_modules() -> None:
    layer = nn.Linear(2, 2)
    assert upstream.has_mode(layer), broken("has_mode", MODULES, "a module has its mode in its attributes")
    for mode in (False, True):
        upstream.set_mode(layer, mode)
        assert layer.training is mode, broken("set_mode", MODULES, "`training` is what was set")
    layer.eval()
    assert vars(layer)[upstream.TRAINING] is False, broken("TRAINING", MODULES, "`eval` sets it")


def test_the_frozen_parameters_of_modules() -> None:
    layer = nn.Linear(2, 2)
    layer.freeze(keys=["bias"])
    assert upstream.frozen(layer) == {"bias"}, broken("frozen", MODULES, "`freeze` names what it freezes there")
    upstream.freeze_also(layer, {"weight"})
    assert layer.trainable_parameters() == {}, broken("freeze_also", MODULES, "what is named there is not trained")


def test_the_random_stream_of_a_thread() -> None:
    stream = upstream.random_stream()
    mx.random.seed(3)
    source = "python/src/random.cpp, RandomState"
    assert stream[0].tolist() == [0, 3], broken("thread_stream", source, "it is the list itself that draws split from")
    assert upstream.random_key().tolist() == [0, 3], broken("random_key", source, "`state` holds the stream's one key")
    first = mx.random.uniform().item()
    stream[0] = mx.random.key(3)
    assert mx.random.uniform().item() == first, broken("thread_stream", source, "putting a key there moves the stream")


def test_a_failure_names_what_to_look_at() -> None:
    text = broken("frozen", MODULES, "it is there")
    assert text.startswith(f"MLX {version('mlx')} changed what mlx_tune.upstream.frozen rests on (python/mlx/nn/")


def test_nothing_else_rests_on_what_mlx_keeps_to_itself() -> None:
    package = Path(upstream.__file__).parent
    private = re.compile(r"\b(_no_grad|get_referents|export_to_dot)\b|\._training\b|\"_training\"")
    found = {
        f"{file.relative_to(package)}:{number}"
        for file in package.rglob("*.py")
        if file.name != "upstream.py"
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if private.search(line) and not line.lstrip().startswith(("#", "`"))
    }
    assert found == set()
