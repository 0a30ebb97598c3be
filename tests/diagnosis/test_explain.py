import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_tune as mt
from mlx_tune.diagnosis import explanations

CAPTURED = mx.array(1.0)


@pytest.mark.parametrize("entry", explanations.ENTRIES, ids=lambda entry: entry.name)
def test_each_entry_explains_its_own_example(entry):
    assert entry in explanations.find(entry.example)
    assert entry.remedies
    assert all(source.startswith("https://") for source in entry.sources)
    assert entry.sources


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda: mx.quantize(mx.zeros((4, 100))), "A width that the group size does not divide"),
        (lambda: mx.compile(lambda x: x * x.item())(mx.array(2.0)), "Evaluating inside a transformation"),
        (lambda: mx.compile(lambda x: x + CAPTURED)(CAPTURED), "A compiled function that captures its own input"),
        (lambda: np.array(mx.zeros(3, mx.bfloat16)), "bfloat16 to NumPy"),
    ],
)
def test_errors_that_mlx_raises_here_are_known(fault, name):
    with pytest.raises(ValueError, match=r".") as caught:
        fault()
    explanation = mt.explain(caught.value)
    assert explanation.known
    assert explanation.name == name


def test_exporting_a_checkpointed_gradient_is_known(tmp_path):
    def step(x):
        return mx.grad(lambda y: mx.checkpoint(lambda z: mx.sin(z * z))(y).sum())(x)

    with pytest.raises((RuntimeError, ValueError)) as caught:
        mx.export_function(str(tmp_path / "step.mlxfn"), step, mx.zeros((4,)))
    assert mt.explain(caught.value).name == "A function that cannot be exported"


def test_a_gradient_of_token_ids_is_known():
    embedding = nn.Embedding(8, 4)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        mx.eval(mx.grad(lambda ids: mx.checkpoint(embedding)(ids.astype(mx.uint32)).sum())(mx.array([1.0])))
    assert mt.explain(caught.value).name == "A gradient through whole numbers"


def test_a_stream_of_another_thread_is_known():
    import threading

    stream = mx.new_stream(mx.cpu)
    seen = []

    def use():
        try:
            mx.eval(mx.add(mx.array(1), mx.array(2), stream=stream))
        except RuntimeError as error:
            seen.append(mt.explain(error).name)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == ["A stream of another thread"]


def test_what_wraps_an_error_of_mlx_is_looked_through():
    inner = RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory")

    def step():
        try:
            raise inner
        except RuntimeError as error:
            raise KeyError("step") from error

    with pytest.raises(KeyError) as caught:
        step()
    assert mt.explain(caught.value).name == "Out of memory on CUDA"
    assert mt.explain(ExceptionGroup("two", [ValueError("x"), inner])).name == "Out of memory on CUDA"


def test_an_unknown_error_says_so():
    explanation = mt.explain(ZeroDivisionError("division by zero"))
    assert not explanation.known
    assert "not in the table" in str(explanation)
    assert "mlx-tune doctor --issue" in str(explanation)


def test_an_error_of_the_library_speaks_for_itself():
    explanation = mt.explain(mt.BudgetError("It needs 9 GB, the budget is 8 GB."))
    assert "It needs 9 GB" in str(explanation)


def test_what_it_prints():
    text = str(mt.explain("[metal::malloc] Resource limit (499000) exceeded."))
    assert text.splitlines()[0] == "Too many buffers"
    assert "\n 1. Evaluate every step" in text
    assert "https://github.com/ml-explore/mlx/issues/1712" in text
    assert max(map(len, text.splitlines()[:-1])) <= 100


def test_what_is_no_exception_is_refused():
    with pytest.raises(mt.InvalidArgumentError, match="not int"):
        mt.explain(3)


def test_it_is_ready_for_json():
    import json

    assert json.loads(json.dumps(mt.explain("[QQMatmul] NYI").to_dict()))["known"] is True
