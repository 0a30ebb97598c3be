import mlx.core as mx
import pytest

from mlx_tune.errors import BudgetError
from mlx_tune.measuring.step_outcome import count_items, fault_of, first_line, is_out_of_memory


@pytest.mark.parametrize(
    ("loss", "fault"),
    [
        (2.5, None),
        (-1.0, None),
        ([0.0, 1.0], None),
        (0.0, "is zero"),
        (float("nan"), "not finite"),
        ([1.0, float("inf")], "not finite"),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_loss_that_proves_nothing_is_told(loss, fault, dtype):
    found = fault_of(mx.array(loss, dtype))
    if fault is None:
        assert found is None
    else:
        assert fault in found.format(size=8)
        assert "batch size 8" in found.format(size=8)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
                      "buffer size of 8 bytes."), True),
        (RuntimeError("[malloc] Unable to allocate 12 bytes."), True),
        (RuntimeError("cudaMallocAsync: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[matmul] Last dimension of first input does not match"), False),
        (BudgetError("The step would be out of memory."), False),
    ],
)  # fmt: skip
def test_only_an_allocators_refusal_is_out_of_memory(error, refused):
    assert is_out_of_memory(error) is refused


def test_work_is_tokens_for_rows_of_integers_and_rows_for_all_else():
    assert count_items(mx.zeros((4, 7), mx.int32), 4) == (28, "tokens")
    assert count_items((mx.zeros((4, 7), mx.uint32), mx.zeros((4, 2))), 4) == (28, "tokens")
    assert count_items(mx.zeros((4, 7)), 4) == (4, "rows")
    assert count_items({"labels": mx.zeros((4,), mx.int32)}, 4) == (4, "rows")
    assert count_items((), 3) == (3, "rows")


def test_an_error_in_one_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
