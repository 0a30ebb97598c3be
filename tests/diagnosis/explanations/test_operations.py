import pytest
from reported_errors import causes_of, reported

REPORTED = (
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
    reported(
        "mlx/utils.cpp",
        "ValueError: [broadcast_shapes] Shapes (64,64) and (3,3) cannot be broadcast.",
        "Shapes that cannot be broadcast",
    ),
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes
