import pytest
from reported_errors import causes_of, reported

CACHE = ("A key/value cache that does not fit its mask or its batch", "Shapes that cannot be broadcast")

REPORTED = (
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
)


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.text[:60])
def test_reported_errors_get_all_their_causes_and_no_other(one):
    assert causes_of(one.text) == one.causes
