import pytest
from reported_errors import causes_of, reported

REPORTED = (
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
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes
