"""Errors of tokenizers, caches, data sets and steps."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX_EXAMPLES, MLX_LM, KnownError

_GENERATE = MLX_LM + "blob/main/mlx_lm/generate.py"
_CACHE = MLX_LM + "blob/main/mlx_lm/models/cache.py"

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
        "A tokenizer without a chat template",
        r"chat_template is not set|No chat template is set",
        "ValueError: Cannot use chat template functions because tokenizer.chat_template is not set and no template "
        "argument was passed!",
        "Chat messages, and mlx-lm's data sets of messages or of prompts and completions, need a template that "
        "turns them into text, and this tokenizer has none. Base models usually have none; a conversion may "
        "have lost it (newer models keep it in a file of its own, `chat_template.jinja`).",
        (
            "Take the instruction-tuned variant of the model, or copy `chat_template.jinja` from the original folder.",
            'To train a base model, write the data as `{"text": ...}` lines, which need no template.',
            "Or set one: `mlx_lm.load(path, tokenizer_config={'chat_template': template})`. It has to be the "
            "one that the model was, or will be, trained with.",
        ),
        (
            MLX_EXAMPLES + "issues/1243",
            "https://github.com/jundot/omlx/issues/2005",
            "https://github.com/arcee-ai/fastmlx/issues/6",
        ),
    ),
    KnownError(
        "A key/value cache that does not fit its mask or its batch",
        r"\[broadcast_shapes\] Shapes \(\d+,\d+,\d+,\d+\) and \(\d+,\d+,\d+,\d+\) cannot be broadcast",
        "ValueError: [broadcast_shapes] Shapes (1,1,1,3691) and (1,16,1,721) cannot be broadcast.",
        "In attention, two arrays of four dimensions (batch, heads, queries, keys) disagree: the mask was made "
        "for another number of keys than the cache holds, or caches of different lengths or kinds were merged. "
        "A cache that is used by two requests at once, or goes on after a request was cancelled, gets into this"
        " state.",
        (
            "Begin with a new cache: `make_prompt_cache(model)`, one for each conversation.",
            "uv pip install -U mlx-lm   # several such faults of servers and sliding windows were mended",
            "In your own model, make the mask from the cache: `create_attention_mask(h, cache)`.",
        ),
        (
            MLX_LM + "issues/742",
            MLX_LM + "issues/545",
            MLX_LM + "issues/1139",
            "https://github.com/exo-explore/exo/issues/2178",
        ),
    ),
    KnownError(
        "A cache that cannot be quantized",
        r"(Batch)?RotatingKVCache Quantization NYI|Quantized SDPA does not support attention sinks",
        "NotImplementedError: RotatingKVCache Quantization NYI",
        "`--kv-bits` quantizes only the caches of full attention. Sliding windows (Gemma, gpt-oss, and every "
        "model under `--max-kv-size`) keep a rotating cache, and attention with sinks (gpt-oss) does not take "
        "quantized keys.",
        (
            "Leave `--kv-bits` out. A sliding window is bounded anyway.",
            "If the memory is for a long text, take a smaller model or quantize its weights: "
            "`mt.quantize_model(model, 4)`.",
        ),
        (MLX_LM + "issues/1573", MLX_LM + "blob/main/mlx_lm/models/base.py", _CACHE),
    ),
    KnownError(
        "Caches that cannot be batched or cut back",
        r"does not yet support batching with history|can only merge caches with the same maximum size"
        r"|Speculative decoding requires a trimmable prompt cache",
        "ValueError: Speculative decoding requires a trimmable prompt cache (got {'ArraysCache'}).",
        "Some caches cannot be joined into a batch once they have a history, or shortened: those of recurrent layers "
        "(Mamba, gated delta nets), and rotating caches that are full.",
        (
            "Generate without the draft model, or without a stored prompt.",
            "Give every request of a batch a new cache of the same size.",
        ),
        (_GENERATE, _CACHE),
    ),
    KnownError(
        "A data set that mlx-lm cannot read",
        r"(Training|Test) set not found or empty|Unsupported data format, check the supported formats"
        r"|Not found Hugging Face dataset",
        "ValueError: Training set not found or empty. Must provide training set for fine-tuning.",
        "mlx-lm looks for `train.jsonl`, `valid.jsonl` and `test.jsonl` in the folder `--data`, and for the "
        "keys `text`, `messages`, or `prompt` and `completion` in each line.",
        (
            "See that the path is the folder, not the file, and that its files have these names.",
            "Look at one line: `head -1 data/train.jsonl` is one JSON object with these keys.",
        ),
        (MLX_EXAMPLES + "issues/597", MLX_LM + "blob/main/mlx_lm/tuner/datasets.py"),
    ),
    KnownError(
        "Fewer examples than a batch",
        r"Dataset must have at least batch_size=\d+|The batch size must be divisible by the number of workers",
        "ValueError: Dataset must have at least batch_size=4 examples but only has 2.",
        "mlx-lm's trainer drops incomplete batches, so every set that it iterates over, the validation set too,"
        " needs at least one whole batch; with several ranks, one that divides among them.",
        (
            "A smaller batch: `--batch-size 1`. Accumulate gradients to keep the effective batch.",
            "More lines in the smaller file, or none: without `valid.jsonl` the training goes on without validation.",
        ),
        (MLX_LM + "blob/main/mlx_lm/tuner/trainer.py",),
    ),
    KnownError(
        "A step that is called with too few arguments",
        r"(?<![\w.])(?:[\w.]+<locals>\.)?\w*(step|loss)\w*\(\) missing \d+ required positional arguments?: "
        r"(?!'(self|closure)')",
        "TypeError: step() missing 1 required positional argument: 'y'",
        "The batch arrived as one argument and the function takes several: `make_batch` returns a single array, or a "
        "loss that begins with the model is called without it.",
        (
            "Return as many values as the step takes, `return x, y`, or take one argument and unpack it inside: "
            "`def step(batch): x, y = batch`.",
            "A loss under `nn.value_and_grad(model, loss)` is called with all its own arguments: `loss(model, "
            "x, y)` as `gradients_of(model, x, y)`.",
        ),
        ("https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.nn.value_and_grad.html",),
    ),
)
