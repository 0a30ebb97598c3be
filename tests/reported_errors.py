"""Texts of errors as people have reported them, or as MLX's source writes them, and the entries that explain each."""

from typing import NamedTuple


class Reported(NamedTuple):
    """A text, the place it was found, and the names of its causes in their order."""

    text: str
    source: str
    causes: tuple[str, ...]


def reported(source: str, text: str, *causes: str) -> Reported:
    return Reported(text, source, causes)


INDICES = ("A gradient through whole numbers", "Expert routing that passes its gradient on")
EXTRA_SCALES = ("Quantized weights for layers that are not quantized", "Parameters that the model does not have")
LACKING_SCALES = ("Plain weights for layers that are quantized", "Parameters that the file lacks")
OTHER_BITS = ("Weights that are packed in another number of bits", "A parameter of another shape")
CACHE = ("A key/value cache that does not fit its mask or its batch", "Shapes that cannot be broadcast")

UNDERSTOOD = (
    # memory
    reported(
        "mlx#479",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command "
        "buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "Out of memory on an Apple GPU",
    ),
    reported("mlx#1712", "RuntimeError: [metal::malloc] Resource limit (499000) exceeded.", "Too many buffers"),
    reported(
        "mlx/io/load.h", "RuntimeError: [write] Unable to write 4194304 bytes to file.", "A file that cannot be written"
    ),
    # Metal
    reported(
        "mlx#1231",
        "[METAL] Command buffer execution failed: Internal Error (0000000e:Internal Error)",
        "GPU work that took too long",
    ),
    reported(
        "mlx-examples#664",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] "
        "Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
        "GPU work that took too long",
    ),
    reported(
        "Acelogic/LTX-2-MLX#5",
        "[METAL] Command buffer execution failed: Impacting Interactivity "
        "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
        "The GPU watchdog",
    ),
    reported(
        "mlx-openai-server#169",
        "[METAL] Command buffer execution failed: Discarded (victim of GPU error/recovery) "
        "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)",
        "The GPU ignores what is submitted",
    ),
    reported(
        "mlx-swift#274",
        "[METAL] Command buffer execution failed: Insufficient Permission (to submit GPU work from "
        "background) (00000006:kIOGPUCommandBufferCallbackErrorBackgroundExecutionNotPermitted)",
        "The GPU in the background of a phone",
    ),
    reported(
        "mlx-vlm#270",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command "
        "buffer execution failed: Invalid Resource (00000009:kIOGPUCommandBufferCallbackErrorInvalidResource)",
        "The GPU touched memory that is not there",
    ),
    reported(
        "mlx#3186",
        'panic(cpu 0): "IOGPUGroupMemory::remove_memory_object() memory object not found" @IOGPUGroupMemory.cpp:323',
        "The Mac panics",
    ),
    reported(
        "mlx#2098",
        "RuntimeError: [metal::Device] Unable to load kernel v_Sqrtcomplex64complex64",
        "A Metal kernel that cannot be loaded or built",
    ),
    # CUDA
    reported(
        "mflux#563",
        "RuntimeError: [quantized_matmul] No implementation for problem shape: 2480x4096x128x1 "
        'activation: bfloat16, bits: 4, group size: 64, mode: "affine".',
        "A quantized product that CUDA lacks",
    ),
    reported(
        "quantized.cpp",
        "RuntimeError: [quantized_matmul] No implementation for problem shape: 16x32x32x8, "
        'transpose: false, activation: float32, bits: 4, group size: 32, mode: "affine".',
        "A quantized product that CUDA lacks",
    ),
    reported(
        "qmv.cu",
        "ValueError: [quantized_matmul] 1-bit quantization is not supported.",
        "A quantized product that CUDA lacks",
    ),
    reported(
        "mlx#2536", "RuntimeError: QuantizedMatmul has no CUDA implementation.", "A quantized product that CUDA lacks"
    ),
    reported("mlx#3122", "RuntimeError: [QMM] NYI: seq > 1", "A quantized product that CUDA lacks"),
    reported(
        "mlx#3859",
        "RuntimeError: Can not find locations of CUDA headers, please set\nenvironment variable CUDA_HOME "
        "or CUDA_PATH.",
        "CUDA headers that are not found",
    ),
    reported(
        "mlx#2821",
        "RuntimeError: cudaMallocManaged failed: an illegal memory access was encountered.",
        "An illegal memory access on CUDA",
    ),
    # loading
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
    # gradients
    reported(
        "primitives.cpp",
        "RuntimeError: [QuantizedMatmul::vjp] no gradient wrt the quantized weights.",
        "A gradient of quantized weights",
    ),
    reported(
        "primitives.cpp of 2024",
        "RuntimeError: QuantizedMatmul::vjp no gradient wrt the quantized matrix yet.",
        "A gradient of quantized weights",
    ),
    reported(
        "primitives.cpp",
        "RuntimeError: [GatherQMM::vjp] no gradient wrt the quantized weights.",
        "A gradient of quantized weights",
    ),
    reported(
        "mlx-vlm#1474",
        "ValueError: [Primitive::vjp] Not implemented for CustomKernel.",
        "A custom kernel has no gradient",
    ),
    reported(
        "primitives.cpp",
        "ValueError: [Primitive::vjp] Not implemented for RandomBits.",
        "An operation without a derivative",
    ),
    reported(
        "mlx#1771",
        "ValueError: [Primitive::jvp] Not implemented for AddMM.",
        "An operation without a forward derivative or without vmap",
    ),
    reported("mlx-lm#1786", "ValueError: [gather_axis] Cannot calculate VJP with respect to indices.", *INDICES),
    reported("mlx-lm#1449", "ValueError: [scatter_axis] Cannot calculate VJP with respect to indices.", *INDICES),
    reported("textpolicy#48", "ValueError: [GatherMM] Cannot calculate VJP with respect to indices", *INDICES),
    reported("primitives.cpp", "RuntimeError: [GatherQMM::vjp] cannot compute the gradient wrt the indices.", *INDICES),
    reported(
        "primitives.cpp",
        "[masked_scatter] Cannot calculate VJP with respect to mask. Use stop_gradient on mask to "
        "stop gradients from being computed.",
        "A gradient through whole numbers",
    ),
    reported(
        "mlx#2169",
        "ValueError: [vjp] Output shape (1) does not match cotangent shape (). If you are using grad your "
        "function must return a scalar.",
        "A loss that is not one number",
    ),
    # shapes and dtypes
    reported(
        "omlx#2305",
        "[scaled_dot_product_attention] Mask type must promote to output type bfloat16",
        "A mask that is more precise than attention",
    ),
    reported(
        "lightning-whisper-mlx#24",
        "ValueError: [addmm] Last dimension of first input with shape (1,1500,1280) must "
        "match second to last dimension of second input with shape (320,1280).",
        "Two widths that differ in a product",
    ),
    reported(
        "MLX-text-completion-notebook#1",
        "[quantized_matmul] The weight matrix should be uint32 but receivedfloat16",
        "Plain weights in a quantized product",
    ),
    reported(
        "mlx-embeddings#21",
        "ValueError: [conv] Expect the input channels in the input and weight array to match but "
        "got shapes - input: (1,384,3,384) and weight: (1152,14,14,3)",
        "Channels in another place",
    ),
    reported(
        "exo#133",
        "[gather] Got indices with invalid dtype. Indices must be integral.",
        "Indices that are not whole numbers",
    ),
    reported("mlx#860", "ValueError: boolean indices are not yet supported", "Indexing with a mask"),
    reported(
        "mlx-swift#269",
        "MLX error: float64 is not supported on the GPU at mlx-c/mlx/c/ops.cpp:643",
        "float64 on the GPU",
    ),
    reported(
        "mlx#1076",
        "uncaught exception of type std::invalid_argument: [Scatter::eval_gpu] Does not support int64",
        "A dtype that scatter does not take on the GPU",
    ),
    reported(
        "mlx#1703", "ValueError: Invalid type  ndarray received in array initialization.", "An object that is no array"
    ),
    reported(
        "mlx#1033",
        "ValueError: [quantize] The last dimension of the matrix needs to be divisible by the "
        "quantization group size 64.",
        "A width that the group size does not divide",
    ),
    # text, caches and data
    reported(
        "mlx-examples#1243",
        "ValueError: Cannot use chat template functions because tokenizer.chat_template is not "
        "set and no template argument was passed!",
        "A tokenizer without a chat template",
    ),
    reported(
        "fastmlx#6",
        "ValueError: No chat template is set for this processor. Please either set the `chat_template` "
        "attribute, or provide a chat template as an argument.",
        "A tokenizer without a chat template",
    ),
    reported(
        "exo#2178", "ValueError: [broadcast_shapes] Shapes (1,1,1,3691) and (1,16,1,721) cannot be broadcast.", *CACHE
    ),
    reported(
        "vllm-metal#114",
        "ValueError: [broadcast_shapes] Shapes (1,8,2196,64) and (1,8,128,64) cannot be broadcast.",
        *CACHE,
    ),
    reported(
        "mlx/utils.cpp",
        "ValueError: [broadcast_shapes] Shapes (64,64) and (3,3) cannot be broadcast.",
        "Shapes that cannot be broadcast",
    ),
    reported(
        "mlx-lm#1573", "NotImplementedError: RotatingKVCache Quantization NYI", "A cache that cannot be quantized"
    ),
    reported(
        "mlx-examples#597",
        "ValueError: Training set not found or empty. Must provide training set for fine-tuning.",
        "A data set that mlx-lm cannot read",
    ),
    reported(
        "mlx_lm/tuner/trainer.py",
        "ValueError: Dataset must have at least batch_size=4 examples but only has 2.",
        "Fewer examples than a batch",
    ),
    reported(
        "Python",
        "TypeError: step() missing 1 required positional argument: 'y'",
        "A step that is called with too few arguments",
    ),
    reported(
        "Python",
        "TypeError: main.<locals>.train_step() missing 2 required positional arguments: 'x' and 'y'",
        "A step that is called with too few arguments",
    ),
    # compiled functions
    reported("libstdc++", "IndexError: _Map_base::at", "A compiled function that lost an array"),
    reported("mlx#2864", "IndexError: unordered_map::at: key not found", "A compiled function that lost an array"),
    reported(
        "mlx#810",
        "RuntimeError: [eval] Graph depth exceeded maximum allowed limit. Try evaluating the graph more frequently.",
        "A graph that is never evaluated",
    ),
    reported(
        "mlx#1880",
        "[compile] Too many inputs/outputs fused in the Metal Compiled primitive which exhausted the "
        "available argument buffers for the kernel.",
        "A compiled kernel with too many arrays",
    ),
    reported("mlx#4110", "terminate called without an active exception", "An abort after a thread has ended"),
    # two errors in one log
    reported(
        "a log",
        "ValueError: Model type gemma3 not supported.\nValueError: [gather] Got indices with invalid dtype.",
        "A model type that the library does not know",
        "Indices that are not whole numbers",
    ),
)

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
