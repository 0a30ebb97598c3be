import pytest
from reported_errors import causes_of, reported

INDICES = ("A gradient through whole numbers", "Expert routing that passes its gradient on")

REPORTED = (
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
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes
