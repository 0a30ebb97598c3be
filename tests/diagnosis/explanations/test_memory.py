import pytest
from reported_errors import causes_of, reported

REPORTED = (
    reported(
        "mlx#479",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command "
        "buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "Out of memory on an Apple GPU",
    ),
    reported("mlx#1712", "RuntimeError: [metal::malloc] Resource limit (499000) exceeded.", "Too many buffers"),
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes
