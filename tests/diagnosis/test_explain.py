import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_tune as mt

CAPTURED = mx.array(1.0)

#: Errors that are none of MLX's, or that only look like one that the table knows.
NOT_UNDERSTOOD = (
    "ZeroDivisionError: division by zero",
    "KeyError: 'model.layers.0.self_attn.q_proj.weight'",
    "FileNotFoundError: [Errno 2] No such file or directory: 'config.json'",
    "AttributeError: 'NoneType' object has no attribute 'shape'",
    "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
    "ModuleNotFoundError: No module named 'torch'",
    "ImportError: cannot import name 'AutoModel' from 'transformers'",
    "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "RuntimeError: The size of tensor a (4) must match the size of tensor b (3) at non-singleton dimension 1",
    "RuntimeError: Error(s) in loading state_dict for Linear: size mismatch for weight",
    "ValueError: operands could not be broadcast together with shapes (2,3) (4,3)",
    "ValueError: cannot reshape array of size 6 into shape (4,2)",
    "IndexError: list index out of range",
    "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    "TypeError: Optimizer.step() missing 1 required positional argument: 'self'",
    "TypeError: LBFGS.step() missing 1 required positional argument: 'closure'",
    "TypeError: forward() missing 1 required positional argument: 'x'",
    "ValueError: Model type llama not supported for GGUF conversion.",
    'keyNotFound(CodingKeys(stringValue: "size", intValue: nil), Swift.DecodingError.Context(codingPath: []))',
    "OSError: [Errno 28] No space left on device",
    "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error",
    "KeyboardInterrupt",
    "",
)


@pytest.mark.parametrize("text", NOT_UNDERSTOOD)
def test_other_errors_are_not_taken_for_one_that_is_known(text):
    assert not mt.explain(text).known


def plain():
    return nn.Linear(64, 64)


def packed():
    return nn.QuantizedLinear(64, 64)


def parameters(model):
    return list(tree_flatten(model.parameters()))


def full_fine_tuning():
    model = nn.Sequential(packed())
    model.unfreeze()
    return nn.value_and_grad(model, lambda x: model(x).sum())(mx.ones((2, 64)))


def through_a_router(x):
    chosen = mx.argpartition(x @ mx.ones((64, 8)), kth=2, axis=-1)[..., :2]
    return mx.gather_mm(x[:, None, None], mx.ones((8, 64, 64)), rhs_indices=chosen).sum()


def product_of_packed(**changes):
    weight, scales, biases = mx.quantize(mx.ones((64, 64)), 64, 4)
    return mx.quantized_matmul(mx.ones((2, 64)), changes.pop("weight", weight), scales, biases, **changes)


def attention(shape=(1, 2, 4, 64), dtype=mx.bfloat16, **more):
    return mx.fast.scaled_dot_product_attention(*[mx.zeros(shape, dtype)] * 3, scale=1.0, **more)


FAULTS = {
    "A width that the group size does not divide": lambda: mx.quantize(mx.zeros((4, 100))),
    "A format of quantization that does not exist": lambda: mx.quantize(mx.zeros((64, 64)), 64, 4, mode="mxfp4"),
    "Evaluating inside a transformation": lambda: mx.compile(lambda x: x * x.item())(mx.array(2.0)),
    "A compiled function that captures its own input": lambda: mx.compile(lambda x: x + CAPTURED)(CAPTURED),
    "bfloat16 to NumPy": lambda: np.array(mx.zeros(3, mx.bfloat16)),
    "Quantized weights for layers that are not quantized": lambda: plain().load_weights(parameters(packed())),
    "Plain weights for layers that are quantized": lambda: packed().load_weights(
        [("weight", mx.zeros((64, 8), mx.uint32)), ("bias", mx.zeros(64))]
    ),
    "Parameters that the file lacks": lambda: plain().load_weights([("weight", mx.zeros((64, 64)))]),
    "Parameters that the model does not have": lambda: plain().update({"gain": mx.zeros(1)}),
    "A parameter of another shape": lambda: plain().load_weights(
        [("weight", mx.zeros((32, 64))), ("bias", mx.zeros(64))]
    ),
    "A weights file that cannot be opened": lambda: mx.load("missing.safetensors"),
    "A gradient of quantized weights": full_fine_tuning,
    "An operation without a derivative": lambda: mx.grad(lambda x: mx.linalg.svd(x, stream=mx.cpu)[1].sum())(mx.eye(3)),
    "An operation without a forward derivative or without vmap": lambda: mx.jvp(
        lambda x: mx.linalg.svd(x, stream=mx.cpu)[1], [mx.eye(3)], [mx.eye(3)]
    ),
    "Expert routing that passes its gradient on": lambda: mx.grad(through_a_router)(mx.ones((2, 64))),
    "A loss that is not one number": lambda: mx.grad(lambda x: x * x)(mx.array([1.0, 2.0])),
    "Plain weights in a quantized product": lambda: product_of_packed(weight=mx.ones((64, 64))),
    "Scales of another number of bits or group size": lambda: product_of_packed(group_size=32),
    "Two widths that differ in a product": lambda: plain()(mx.zeros((2, 32))),
    "Shapes that cannot be broadcast": lambda: mx.zeros((2, 3)) + mx.zeros((4, 3)),
    "A key/value cache that does not fit its mask or its batch": lambda: (
        mx.zeros((1, 1, 1, 9)) + mx.zeros((1, 2, 1, 7))
    ),
    "Targets that do not fit the logits": lambda: nn.losses.cross_entropy(mx.zeros((2, 4)), mx.zeros((2, 1), mx.int32)),
    "Arrays that cannot be joined": lambda: mx.concatenate([mx.zeros((1, 8, 4)), mx.zeros((1, 4, 4))], axis=2),
    "A shape with another number of values": lambda: mx.zeros((2, 4)).reshape(3, 3),
    "Channels in another place": lambda: nn.Conv2d(3, 8, 3)(mx.zeros((1, 3, 8, 8))),
    "A mask that is more precise than attention": lambda: attention(mask=mx.zeros((4, 4))),
    "Queries, keys and values that do not fit": lambda: attention(dtype=mx.int32),
    "Indices that are not whole numbers": lambda: nn.Embedding(4, 4)(mx.zeros((1, 2))),
    "Indexing with a mask": lambda: mx.zeros(4)[mx.zeros(4) > 0],
    "Whole numbers in a product": lambda: mx.zeros((2, 4), mx.int32) @ mx.zeros((4, 4), mx.int32),
    "An object that is no array": lambda: mx.array([1, None]),
    "A step that is called with too few arguments": lambda: (lambda step: step(1))(_step),
    "Another mlx_tune is in the way": lambda: mt.no_such_name,
}


def _step(x, y):
    return x + y


@pytest.mark.parametrize("name", FAULTS)
def test_errors_that_mlx_raises_here_are_known(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r".") as caught:
        mx.eval(FAULTS[name]())
    explanation = mt.explain(caught.value)
    assert explanation.known
    assert name in {explanation.name, *(other.name for other in explanation.also)}


def test_a_file_that_is_no_safetensors_or_is_cut_off_is_known(tmp_path):
    pointer, cut = tmp_path / "pointer.safetensors", tmp_path / "cut.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    mx.save_safetensors(str(cut), {"a": mx.zeros((100, 100))})
    cut.write_bytes(cut.read_bytes()[:2000])
    for file in (pointer, cut):
        with pytest.raises(RuntimeError) as caught:
            mx.eval(mx.load(str(file)))
        assert mt.explain(caught.value).name == "A weights file that is damaged or of another kind"


def test_mlx_lm_says_what_the_table_expects():
    from mlx_lm.models.cache import RotatingKVCache
    from mlx_lm.tuner.trainer import iterate_batches
    from mlx_lm.utils import _get_classes

    faults = {
        "A cache that cannot be quantized": lambda: RotatingKVCache(8).to_quantized(),
        "Fewer examples than a batch": lambda: next(iterate_batches([([1, 2], 0)] * 2, 4, 16)),
        "A model type that the library does not know": lambda: _get_classes({"model_type": "no_such_model"}),
    }
    for name, fault in faults.items():
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            fault()
        assert mt.explain(caught.value).name == name


def test_no_advice_to_checkpoint_or_shrink_where_a_kernel_has_no_gradient():
    text = str(mt.explain("ValueError: [Primitive::vjp] Not implemented for CustomKernel."))
    assert "mt.checkpoint" not in text
    assert "mx.stop_gradient(ids)" not in text
    assert "model.train()" in text


def test_a_text_with_two_causes_shows_both_and_says_so_in_json():
    explanation = mt.explain("[gather_axis] Cannot calculate VJP with respect to indices.")
    assert [other.name for other in explanation.also] == ["Expert routing that passes its gradient on"]
    text = str(explanation)
    assert text.count("What to do:") == 2
    assert "It may also be this:\n\nExpert routing that passes its gradient on\n" in text
    assert explanation.to_dict()["also"][0]["name"] == "Expert routing that passes its gradient on"


def test_an_error_and_its_cause_are_both_explained_each_once():
    try:
        try:
            mx.zeros((2, 3)) + mx.zeros((4, 3))
        except ValueError as inner:
            raise RuntimeError("[broadcast_shapes] Shapes (2,3) and (4,3): Unable to build metal library") from inner
    except RuntimeError as error:
        explanation = mt.explain(error)
    assert explanation.name == "Shapes that cannot be broadcast"
    assert explanation.also == ()


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
