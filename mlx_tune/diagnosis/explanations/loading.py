"""Errors of loading and saving: files and models that do not fit each other."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX, MLX_EXAMPLES, MLX_LM, MLX_VLM, KnownError

_MODULE = MLX + "blob/main/python/mlx/nn/layers/base.py"
_SAFETENSORS = MLX + "blob/main/mlx/io/safetensors.cpp"
_UPDATE = "uv pip install -U mlx-lm mlx-vlm   # model code and converted files change together"

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
        "Quantized weights for layers that are not quantized",
        r"Received (\d+ )?parameters not in model[\s\S]*\b(scales|biases)\b|unhandledKeys\(.*\b(scales|biases)\b",
        "ValueError: Received 338 parameters not in model: \n"
        "language_model.model.layers.14.conv.out_proj.scales,\n"
        "language_model.model.layers.14.feed_forward.w1.biases.",
        "The file holds the scales and biases of quantized layers, and the model has plain layers in their place: "
        "`config.json` has no `quantization`, or the library that loads leaves out layers that the library that "
        "converted has quantized, such as a vision or audio tower.",
        (
            _UPDATE,
            "See whether `config.json` has an entry `quantization` with `bits` and `group_size`; without it nothing is "
            "quantized before loading.",
            "By hand, quantize before `load_weights` exactly the layers that the file has scales for: "
            "`nn.quantize(model, group_size=64, bits=4, class_predicate=lambda path, _: path + '.scales' in weights)`.",
            "Do not load with `strict=False`: packed weights would stand in plain layers.",
        ),
        (
            MLX_VLM + "issues/596",
            MLX_VLM + "issues/429",
            "https://github.com/jjang-ai/vmlx/issues/87",
            "https://github.com/ml-explore/mlx-swift-examples/issues/53",
        ),
    ),
    KnownError(
        "Parameters that the model does not have",
        r"Received (\d+ )?parameters not in model|unhandledKeys\(|Module does not have (parameter|sub-module) named",
        "ValueError: Received 2 parameters not in model: \nmulti_modal_projector.layer_norm.bias,\n"
        "multi_modal_projector.layer_norm.weight.",
        "The file has parameters that the model's code does not make. The code is older or newer than the file,"
        " or the file is of another architecture, or it carries weights that nothing uses (keys and values of "
        "layers that share another layer's cache).",
        (
            _UPDATE,
            "Compare the names with the model's: `dict(mlx.utils.tree_flatten(model.parameters())).keys()`.",
            "Where the names are known to be unused, drop them from the dictionary before `load_weights`. "
            "`strict=False` drops them too, and hides every other difference.",
        ),
        (MLX + "issues/1024", MLX_VLM + "issues/1340", MLX_VLM + "issues/1002", _MODULE),
    ),
    KnownError(
        "Plain weights for layers that are quantized",
        r"Missing (\d+ )?parameters[\s\S]*\b(scales|biases)\b|keyNotFound\((base|path):.*\b(scales|biases)\b",
        "ValueError: Missing 2 parameters: \nmodel.layers.0.self_attn.q_proj.biases,\n"
        "model.layers.0.self_attn.q_proj.scales.",
        "The model's layers were quantized before loading, and the file has no scales (or no biases) for them: "
        "it is not quantized, or quantizes fewer layers, or uses a mode without biases (mxfp4, mxfp8, nvfp4) "
        "where the loader expects affine.",
        (
            "Compare `quantization` in `config.json` with the names in the file. Where only biases are missing, the "
            "`mode` is missing there.",
            "Quantize only the layers that the file has scales for (`class_predicate` of `nn.quantize`).",
            _UPDATE,
        ),
        ("https://github.com/ml-explore/mlx-swift-lm/issues/261", _MODULE),
    ),
    KnownError(
        "Parameters that the file lacks",
        r"Missing (\d+ )?parameters: |keyNotFound\((base|path):|\bKey \S+ not found in \w+",
        "ValueError: Missing 2 parameters: \nmulti_modal_projector.layer_norm.bias,\n"
        "multi_modal_projector.layer_norm.weight.",
        "The model has parameters that the file does not fill. Adapters were loaded as if they were a whole "
        "model, a shard of the file is missing, the output head is tied to the embedding, or the model's code "
        "is of another version than the file.",
        (
            "Adapters hold only what was trained: `model.load_weights('adapters.safetensors', strict=False)` after the "
            "LoRA layers were put in, or `mlx_lm.load(path, adapter_path=...)`.",
            "See that every shard named in `model.safetensors.index.json` is in the folder.",
            _UPDATE,
        ),
        (
            MLX_EXAMPLES + "issues/228",
            MLX_VLM + "issues/679",
            "https://github.com/ml-explore/mlx-swift/issues/195",
            _MODULE,
        ),
    ),
    KnownError(
        "Weights that are packed in another number of bits",
        r"Expected shape \(((?:\d+, )+)(\d+)\) but received shape \(\1(?!\2\))\d+\) for parameter "
        r"\S+\.(weight|scales|biases)"
        r"|mismatchedSize\(key: \"(biases|scales)\"|Mismatched parameter (scales|biases) (shape|size)",
        "ValueError: Expected shape (10240, 640) but received shape (10240, 960) for parameter "
        "language_model.model.layers.0.linear_attn.in_proj_qkv.weight",
        "All but the last dimension agree, as they do where a weight was quantized with other bits or another "
        "group size: a packed row of width 5120 has 640 numbers at 4 bits and 960 at 6. Files of mixed "
        "precision need the bits of each layer in `config.json`.",
        (
            "Look for the layer under `quantization` in `config.json`: its own bits and group size belong there.",
            "Files that `mlx_tune.lm.save_quantized` writes have them; convert again where another tool left them out.",
            _UPDATE,
        ),
        ("https://github.com/ml-explore/mlx-swift-examples/issues/178", _MODULE),
    ),
    KnownError(
        "A parameter of another shape",
        r"Expected shape \(.*\) but received shape|mismatchedSize\(key:|Expected mx\.array but received",
        "ValueError: Expected shape (512, 2048) but received shape (2048, 2048) for parameter "
        "language_model.layers.0.self_attn.k_proj.weight",
        "The model that was built from the configuration is not the one that the file was saved from: other "
        "heads or widths, an extended vocabulary, a pruned layer, or a convolution in PyTorch's order (MLX "
        "keeps channels last).",
        (
            "Compare `config.json` with the file it came with; a default that the loader assumed may be the "
            "difference.",
            _UPDATE,
            "Weights from PyTorch: `weight.transpose(0, 2, 3, 1)` for Conv2d, `weight.transpose(0, 2, 1)` for "
            "Conv1d, and `mx.array(weight)` where they are not MLX arrays.",
        ),
        (MLX_VLM + "issues/678", "https://github.com/Blaizzy/mlx-audio/pull/715", _MODULE),
    ),
    KnownError(
        "Adapters of another model",
        r"Adapter at .* contains incompatible tensors",
        "ValueError: Adapter at adapters contains incompatible tensors:\n"
        "  layers.0.proj.lora_a: adapter shape (5, 2) does not match model parameter shape (4, 2)",
        "The adapters were trained on a model of other widths or layers, or with another rank than "
        "`adapter_config.json` beside them says.",
        (
            "Load them with the model that `adapter_config.json` names.",
            "See that `rank`, `keys` and `num_layers` there are those of the training run.",
        ),
        (MLX_LM + "issues/1725", MLX_LM + "blob/main/mlx_lm/tuner/utils.py"),
    ),
    KnownError(
        "A model type that the library does not know",
        r"Model type \S+ not supported(?! for GGUF)|No module named 'mlx_(lm|vlm)\.models\.",
        "ValueError: Model type glm4_moe_lite not supported.",
        "`model_type` in `config.json` names code that this version of the library does not have: it is too "
        "old, or the model belongs to another library (models with images or sound to mlx-vlm), or nobody has "
        "written it yet.",
        (
            _UPDATE,
            "For a model that takes images or sound, load with mlx-vlm: `uv pip install mlx-vlm`.",
            "An application with a copy of its own (LM Studio, a plug-in) has to be updated itself.",
        ),
        (MLX_LM + "issues/806", MLX_LM + "issues/670", MLX_VLM + "issues/207"),
    ),
    KnownError(
        "A weights file that cannot be opened",
        r"\[load(_\w+)?\] Failed to open|No safetensors found in",
        "RuntimeError: [load_safetensors] Failed to open file MiniMax-M1-80k/model-00075-of-00414.safetensors",
        "The file is not there or may not be read: a download that ended early (often for lack of disk), a "
        "wrong folder, or a model that is not in safetensors.",
        (
            "Look into the folder, and at the disk: `mlx-tune doctor --only disk`.",
            "Download again; what is complete is not fetched twice.",
        ),
        (MLX_LM + "issues/251", _SAFETENSORS, MLX_LM + "blob/main/mlx_lm/utils.py"),
    ),
    KnownError(
        "A weights file that is damaged or of another kind",
        r"\[load_safetensors\] (Invalid json header|Tensor .* invalid data offsets)"
        r"|\[load\] (Invalid header|Unknown file)|\[read\] Unable to read",
        "RuntimeError: [load_safetensors] Invalid json header length file model.safetensors",
        "The file is not what its name says. It may have been cut off, it may be a pointer of git-lfs (a few "
        "lines of text that begin with `version https://git-lfs`), or another format under this name.",
        (
            "Look at its size and its first bytes: `head -c 100 model.safetensors`.",
            "A pointer: `git lfs pull`. A file that was cut off: download it again.",
            "`[load] Invalid header` for a sound safetensors file means an MLX from before the format: "
            "`uv pip install -U mlx`.",
        ),
        ("https://github.com/mlalma/kokoro-ios/issues/4", MLX_EXAMPLES + "issues/341", _SAFETENSORS),
    ),
    KnownError(
        "A file that cannot be written",
        r"\[write\] Unable to write|\[save(_\w+)?\] Failed to open",
        "RuntimeError: [write] Unable to write 1073741824 bytes to file.",
        "The disk is full, a quota or a limit on file sizes is reached, or the folder may not be written to. "
        "The file that was begun is not complete.",
        (
            "Free space or write elsewhere: `mlx-tune doctor --only disk` says what is left.",
            "Delete the file that was begun: a later run may take it for a whole one.",
        ),
        (MLX + "blob/main/mlx/io/load.h",),
    ),
)
