import pytest
from reported_errors import causes_of, reported

EXTRA_SCALES = ("Quantized weights for layers that are not quantized", "Parameters that the model does not have")
LACKING_SCALES = ("Plain weights for layers that are quantized", "Parameters that the file lacks")
OTHER_BITS = ("Weights that are packed in another number of bits", "A parameter of another shape")

REPORTED = (
    reported(
        "mlx/io/load.h", "RuntimeError: [write] Unable to write 4194304 bytes to file.", "A file that cannot be written"
    ),
    reported(
        "mlx-vlm#596",
        "ValueError: Received 338 parameters not in model: \n"
        "language_model.model.layers.14.conv.out_proj.scales,\nlanguage_model.model.layers.14.feed_forward.w1.biases",
        *EXTRA_SCALES,
    ),
    reported(
        "vmlx#87",
        "ValueError: Received 2 parameters not in model: \n"
        "language_model.model.per_layer_model_projection.biases,\n"
        "language_model.model.per_layer_model_projection.scales.",
        *EXTRA_SCALES,
    ),
    reported(
        "mlx-swift-examples#53", 'Failed: unhandledKeys(base: "Embedding", keys: ["biases", "scales"])', *EXTRA_SCALES
    ),
    reported(
        "mlx-vlm#1002",
        "ValueError: Received 2 parameters not in model: multi_modal_projector.layer_norm.bias and weight.",
        "Parameters that the model does not have",
    ),
    reported(
        "mlx-lm#211",
        "ValueError: Received parameters not in model: model.layers.38.mlp.switch_mlp.down_proj.weight "
        "model.layers.11.mlp.s",
        "Parameters that the model does not have",
    ),
    reported(
        "mlx-vlm#679",
        "ValueError: Missing 2 parameters: \nmulti_modal_projector.layer_norm.bias,\n"
        "multi_modal_projector.layer_norm.weight.",
        "Parameters that the file lacks",
    ),
    reported(
        "mlx-examples#228",
        "ValueError: Missing parameters: layers.24.attention.wk.weight layers.16.attention.wq.linear.weight ...",
        "Parameters that the file lacks",
    ),
    reported("mlx-swift#195", "Key weight not found in Linear", "Parameters that the file lacks"),
    reported(
        "mlx-swift-examples#218",
        'keyNotFound(base: "SuScaledRotaryEmbedding", key: "_freqs")',
        "Parameters that the file lacks",
    ),
    reported(
        "mlx-swift-lm#261",
        'keyNotFound(path: ["language_model", "model", "layers", "0", "per_layer_input_gate", '
        '"biases"], modules: ["Gemma4Model", "QuantizedLinear"])',
        *LACKING_SCALES,
    ),
    reported(
        "nn/layers/base.py",
        "ValueError: Missing 2 parameters: \nmodel.layers.0.mlp.up_proj.biases,\nmodel.layers.0.mlp.up_proj.scales.",
        *LACKING_SCALES,
    ),
    reported(
        "nn/layers/base.py",
        "ValueError: Expected shape (10240, 640) but received shape (10240, 960) for parameter "
        "language_model.model.layers.0.linear_attn.in_proj_qkv.weight",
        *OTHER_BITS,
    ),
    reported(
        "mlx-swift-examples#178",
        'mismatchedSize(key: "biases", expectedShape: [100352, 80], actualShape: [100352, 160])',
        *OTHER_BITS,
    ),
    reported(
        "mlx-swift-examples#375",
        "Mismatched parameter scales shape. Actual [1024, 40], expected [256, 40]",
        "Weights that are packed in another number of bits",
    ),
    reported(
        "mlx-vlm#678",
        "Expected shape (512, 2048) but received shape (2048, 2048) for parameter "
        "language_model.layers.0.self_attn.k_proj.weight",
        "A parameter of another shape",
    ),
    reported(
        "mlx_lm/tuner/utils.py",
        "ValueError: Adapter at adapters contains incompatible tensors:\n"
        "  layers.0.proj.lora_typo: not an adapter parameter in the model",
        "Adapters of another model",
    ),
    reported(
        "mlx-lm#806",
        "ERROR:root:Model type glm4_moe_lite not supported.",
        "A model type that the library does not know",
    ),
    reported(
        "mlx-vlm#303",
        "ModuleNotFoundError: No module named 'mlx_vlm.models.nemotron-nas'",
        "A model type that the library does not know",
    ),
    reported(
        "mlx-lm#251",
        "RuntimeError: [load_safetensors] Failed to open file MiniMax-M1-80k/model-00075-of-00414.safetensors",
        "A weights file that cannot be opened",
    ),
    reported(
        "kokoro-ios#4",
        "MLX error: [load_safetensors] Invalid json header length file kokoro-v1_0.safetensors",
        "A weights file that is damaged or of another kind",
    ),
    reported(
        "mlx-examples#336",
        "RuntimeError: [load] Invalid header in file solar_q8/weights.00.safetensors",
        "A weights file that is damaged or of another kind",
    ),
    reported(
        "a log",
        "ValueError: Model type gemma3 not supported.\nValueError: [gather] Got indices with invalid dtype.",
        "A model type that the library does not know",
        "Indices that are not whole numbers",
    ),
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes
