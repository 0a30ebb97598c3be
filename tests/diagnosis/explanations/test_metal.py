import pytest
from reported_errors import causes_of, reported

REPORTED = (
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
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes
