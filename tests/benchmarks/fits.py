"""How close `lm.fits` comes to real runs of mlx-lm, and what an answer about a large model costs.

Thirty architectures at toy sizes, each in a process of its own: what is predicted from the configuration, with fewer of
the equal blocks as for a large model, against mlx-lm's own `train`, plain and with checkpointed blocks, and against its
batch generator. Each runs under a memory limit of one byte, once as it comes and once with the device keeping up with
dispatch, and the smaller peak counts. With `--large`
nothing is run: seconds and resident memory of the answers about real models.

    python tests/benchmarks/fits.py [--quick] [--only NAME ...] [--large] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parents[1] / "models"
LARGE = (
    ("meta-llama/Llama-3.1-8B", "M3 Max 64GB", "4"),
    ("meta-llama/Llama-3.1-70B", "M3 Ultra 512GB", "4"),
    ("meta-llama/Llama-3.1-405B", "M3 Ultra 512GB", "4"),
    ("deepseek-ai/DeepSeek-V3", "M3 Ultra 512GB", "3"),
)
FAMILIES = (
    *("llama", "qwen3", "gemma2", "gemma3_text", "lfm2", "falcon_h1", "mamba2", "qwen3_moe", "deepseek", "deepseek_v2"),
    *("deepseek_v3", "glm4_moe", "glm4_moe_lite", "laguna", "qwen2_moe", "qwen3_next", "mixtral", "gpt_oss", "olmoe"),
    *("phimoe", "granitemoe", "minimax", "dots1", "ernie4_5_moe", "lfm2_moe", "bailing_moe", "Klear", "afmoe"),
    *("exaone_moe", "solar_open"),
)
RUNS = 1
WAYS = ("plain", "checkpointed", "generating")
#: Sizes that go with the width.
OWN = {"lfm2": {"block_dim": 256}}
#: mlx-lm's code of these takes no batch of prompts.
ALONE = ("gemma2",)
QUICK = ("llama", "gemma3_text", "deepseek_v3", "mamba2")
BLOCKS, TRAINED, ROWS, LENGTH, CONTEXT = 10, 3, 4, 96, 512
SIZES = {"num_hidden_layers": BLOCKS, "hidden_size": 256, "vocab_size": 2048, "torch_dtype": "float32"}
#: The longest row of all: caches grow by 256 tokens, which is a large part of a short context.
SIZES["max_position_embeddings"] = 2 * CONTEXT
#: The aims: errors of at most this share, and never further below the truth than that.
CLOSE, BELOW = 0.05, 0.03


def generated(family: str) -> int:
    """Rows that are generated at a time."""
    return 1 if family in ALONE else ROWS


def predict(family: str) -> dict[str, int]:
    """The floors of the three, from the configuration."""
    from workload_models import configuration

    from mlx_tune.lm.capacity.depth import DeepCourse
    from mlx_tune.lm.capacity.inference import RunModel
    from mlx_tune.lm.capacity.training import TrainedModel, Tuning, training_course
    from mlx_tune.lm.capacity.unloaded import Unloaded

    unloaded, tuning = Unloaded(configuration(family, **SIZES, **OWN.get(family, {}))), Tuning(num_layers=TRAINED)
    trained, found = TrainedModel(unloaded, tuning), {}
    for way, checkpoint in (("plain", False), ("checkpointed", True)):
        course = DeepCourse(
            trained.depths,
            lambda repeats, rows, length, checkpoint=checkpoint: training_course(
                trained.shorter(repeats), tuning, rows, length, backend="cpu", checkpoint=checkpoint
            ),
            ROWS,
            LENGTH,
        )
        found[way] = course(ROWS, LENGTH).peak_bytes
    return found | {"generating": RunModel(unloaded, "cpu").floor(generated(family), CONTEXT).bytes}


def run(family: str, way: str) -> None:
    """Build the model, and train it or generate with it as mlx-lm does."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from workload_models import configuration

    from mlx_tune.checkpointing import checkpoint_blocks
    from mlx_tune.lm.adapters import add_adapters, make_optimizer
    from mlx_tune.lm.capacity.unloaded import Unloaded

    model = Unloaded(configuration(family, **SIZES, **OWN.get(family, {}))).build()
    mx.eval(model.parameters())
    if way == "generating":
        rows, written = generated(family), 0
        generator = BatchGenerator(model, stream=mx.default_stream(mx.cpu))
        generator.insert([[1] * (CONTEXT - 2)] * rows, [2] * rows)
        while written < 2 * rows:
            written += len(generator.next_generated())
        return
    add_adapters(model, num_layers=TRAINED)
    mx.eval(model.parameters())
    data = [([i % 7 + 1] * LENGTH, 0) for i in range(ROWS)]
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint_blocks(model) if way == "checkpointed" else contextlib.nullcontext(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        args = TrainingArgs(
            batch_size=ROWS, iters=3, max_seq_length=LENGTH, adapter_file=str(Path(folder) / "adapters.safetensors")
        )
        train(model, make_optimizer("adam"), data, args=args)


def measure(family: str) -> dict[str, Any]:
    """Predict and run one architecture in this process."""
    import mlx.core as mx
    from keeping_up import CAN_KEEP_UP, keep_up, throttled_peak

    def peaks(runs: int) -> dict[str, list[int]]:
        held = mx.get_active_memory()
        return {way: [throttled_peak(lambda way=way: run(family, way)) - held for _ in range(runs)] for way in WAYS}

    predicted, found = predict(family), peaks(RUNS)
    if CAN_KEEP_UP:
        keep_up()  # from here on, and for good
        found = {way: found[way] + again for way, again in peaks(1).items()}
    return {"name": family, "predicted": predicted, "measured": {way: min(found[way]) for way in WAYS}}


def answer(model: str, machine: str, bits: str) -> dict[str, Any]:
    """Seconds and resident memory of one answer, in this process."""
    from mlx_tune.lm import fits

    started = time.process_time()
    found = fits(MODELS / f"{model}.json", machine=machine, bits=int(bits))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "name": found.model,
        "bits": int(bits),
        "weights": found.weights_bytes,
        "seconds": found.seconds,
        "processor_seconds": time.process_time() - started,
        "resident": resident,
        "fits": found.fits,
        "needs": found.peak_bytes,
    }


def in_child(*words: str) -> dict[str, Any]:
    """What this script prints when it is called so."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_errors(rows: list[dict[str, Any]]) -> None:
    """The table of errors, and the misses by name."""
    from mlx_tune.presentation.tables import render_table
    from mlx_tune.units import format_bytes

    errors = {
        (row["name"], way): row["predicted"][way] / row["measured"][way] - 1 for row in rows for way in row["predicted"]
    }
    cells = []
    for row in rows:
        cells.append([row["name"]])
        for way in row["predicted"]:
            cells[-1] += [format_bytes(row["predicted"][way]), format_bytes(row["measured"][way])]
            cells[-1].append(f"{errors[row['name'], way]:+.1%}")
    shares = list(errors.values())
    within = sum(abs(share) <= CLOSE for share in shares)
    missed = [
        f"{name} {way} {share:+.1%}" for (name, way), share in errors.items() if abs(share) > CLOSE or share < -BELOW
    ]
    heads = [word for way in rows[0]["predicted"] for word in (way, "measured", "error")]
    print(
        render_table(
            ["model", *heads],
            [tuple(row) for row in cells],
            notes=[
                f"{len(rows)} configurations, {len(shares)} peaks: median error "
                f"{statistics.median(map(abs, shares)):.2%}, worst {max(map(abs, shares)):.2%}, furthest below the "
                f"truth {min(shares):+.2%}.",
                f"Within {CLOSE:.0%}: {within} of {len(shares)}. Missed: {', '.join(missed) or 'none'}.",
            ],
        )
    )


def print_large(rows: list[dict[str, Any]]) -> None:
    """The cost of the answers."""
    from mlx_tune.presentation.tables import render_table
    from mlx_tune.units import format_bytes

    print(
        render_table(
            ["model", "bits", "weights", "LoRA needs", "fits", "seconds", "of a core", "resident"],
            [
                (
                    row["name"],
                    str(row["bits"]),
                    format_bytes(row["weights"]),
                    format_bytes(row["needs"]),
                    "yes" if row["fits"] else "no",
                    f"{row['seconds']:.1f}",
                    f"{row['processor_seconds']:.1f}",
                    format_bytes(row["resident"]),
                )
                for row in rows
            ],
        )
    )


def main() -> None:
    """Measure each in a child process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four architectures only")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="these architectures only")
    parser.add_argument("--large", action="store_true", help="time and memory of answers about large models")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(answer(*options.child) if options.large else measure(*options.child)))
        return
    rows = []
    if options.large:
        for words in LARGE:
            rows.append(in_child("--large", "--child", *words))
            print(rows[-1], file=sys.stderr)
        print_large(rows)
    else:
        for family in options.only or (QUICK if options.quick else FAMILIES):
            try:
                rows.append(in_child("--child", family))
                print(f"{family}: {rows[-1]['predicted']} {rows[-1]['measured']}", file=sys.stderr)
            except ChildProcessError as error:
                print(error)
        print_errors(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
