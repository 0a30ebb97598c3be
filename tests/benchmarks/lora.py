"""mlx_lm.lora at its defaults against `mlx-tune lora --batch-size auto`: rate, peak, loss after the same tokens.

    python tests/benchmarks/lora.py --model PATH --tokens FILE.npy [--steps 100] [--quick] [--json FILE]

The data are rows cut from a token file, turned back into text, nine tenths to train on and the rest to validate on.
Each run is a process of its own, one after the other; all read the same rows and start from the same seed. mlx_lm.lora
runs first and last, so that the table shows how much two equal runs differ. With --float32, which a CPU wants, 100
steps take about two minutes a run on two cores, and each search two to five more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_tune.presentation.tables import render_table
from mlx_tune.units import format_bytes, format_seconds

#: Runs mlx-lm's own `run` in a process of its own, and prints what it reported and what the process took.
_PLAIN = """
import json, sys, time
import mlx.core as mx
from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_tune.devices import footprint_bytes

class Log(TrainingCallback):
    lines = []
    def on_train_loss_report(self, info):
        self.lines.append([info["trained_tokens"], info["train_loss"], info["tokens_per_second"]])

lora.get_reporting_callbacks = lambda *args, **options: Log()
sys.argv = ["mlx_lm.lora", *sys.argv[2:]]
started = time.perf_counter()
lora.main()
seconds = time.perf_counter() - started
answer = {"lines": Log.lines, "peak_bytes": mx.get_peak_memory(), "footprint_bytes": footprint_bytes()}
answer["seconds"] = seconds
open(OUT, "w").write(json.dumps(answer))
"""


def main() -> None:
    """Make the data, run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="a .npy file of tokens of the domain to learn")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--memory-budget", default="2GB")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument(
        "--max-batch-rows", type=int, default=None, help="rows of the validation set: no batch is larger"
    )
    parser.add_argument("--float32", action="store_true", help="train a float32 copy: a CPU has no fast bfloat16")
    parser.add_argument("--quick", action="store_true", help="ten steps")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.steps = 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(options, folder / "data")
        if options.float32:
            options.model = float32_copy(options.model, folder / "model")
        shared = ["--model", options.model, "--data", str(folder / "data"), "--train", "--iters", str(options.steps)]
        shared += ["--num-layers", str(options.num_layers), "--val-batches", "1", "--steps-per-eval", "1000000"]
        shared += ["--steps-per-report", "5", "--seed", "0"]
        runs = {"mlx_lm.lora": measured("mlx_lm.lora", plain, shared, folder, "plain")}
        auto = ["--batch-size", "auto", "--memory-budget", options.memory_budget]
        both = [*auto, "--grad-checkpoint", "auto"]
        for name, words in {"mlx-tune lora --batch-size auto": auto, "... --grad-checkpoint auto": both}.items():
            runs[name] = measured(name, ours, [*shared, *words], folder, f"run{len(runs)}")
        runs["mlx_lm.lora, again"] = measured("mlx_lm.lora, again", plain, shared, folder, "again")
    print(table(runs, options))
    if options.json:
        Path(options.json).write_text(json.dumps(runs, indent=2))


def make_data(options: argparse.Namespace, folder: Path) -> None:
    """Rows of text of about `length` tokens each."""
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(Path(options.model))
    tokens = np.load(options.tokens).astype(int)
    rows = [tokens[i * options.length : (i + 1) * options.length - 1].tolist() for i in range(options.rows)]
    texts = [tokenizer.decode(row) for row in rows if len(row) == options.length - 1]
    folder.mkdir()
    held_out = texts[::10][: options.max_batch_rows]
    training = [text for i, text in enumerate(texts) if i % 10]
    for file, part in (("train.jsonl", training), ("valid.jsonl", held_out)):
        (folder / file).write_text("\n".join(json.dumps({"text": text}) for text in part))


def float32_copy(model: str, folder: Path) -> str:
    """The same model with float32 weights, in a folder of its own."""
    import mlx.core as mx
    from mlx_lm.utils import save_model

    from mlx_tune import lm

    loaded, tokenizer, config, _ = lm.load(model)
    loaded.set_dtype(mx.float32)
    save_model(folder, loaded)
    tokenizer.save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return str(folder)


def measured(
    name: str, run: Callable[[list[str], Path, str], dict[str, Any]], words: list[str], folder: Path, place: str
) -> dict[str, Any]:
    """A run, with a line that says that it is done."""
    answer = run(words, folder, place)
    print(f"{name}: {answer['tokens_per_second']:,.0f} tokens/s at batch {answer['batch_size']}", flush=True)
    return answer


def plain(words: list[str], folder: Path, name: str) -> dict[str, Any]:
    """mlx_lm.lora itself."""
    out = folder / f"{name}.json"
    code = _PLAIN.replace("OUT", repr(str(out)))
    _run([sys.executable, "-c", code, "-", *words, "--adapter-path", str(folder / name)])
    answer = json.loads(out.read_text())
    lines = answer.pop("lines")
    rate = lines[-1][0] / sum((b[0] - a[0]) / b[2] for a, b in zip([[0], *lines], lines, strict=False))
    return {**answer, "batch_size": 4, "tokens": lines[-1][0], "tokens_per_second": rate, "lines": lines}


def ours(words: list[str], folder: Path, name: str) -> dict[str, Any]:
    """mlx-tune lora."""
    answer = json.loads(
        _run([sys.executable, "-m", "mlx_tune", "lora", *words, "--adapter-path", str(folder / name), "--json"])
    )
    lines = [[line["tokens"], line["loss"], line["tokens_per_second"]] for line in answer["losses"]]
    names = ("peak_bytes", "footprint_bytes", "seconds", "batch_size", "tokens", "tokens_per_second", "checkpointed")
    fit = answer["fit"] or {}
    search = {"search_seconds": fit.get("search_seconds"), "trials": fit.get("trials")}
    return {**{name: answer[name] for name in names}, **search, "lines": lines}


def _run(words: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words[:6]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def loss_at(lines: list[list[float]], tokens: float) -> float:
    """The training loss once so many tokens were seen, averaged over the reports of the tenth before it."""
    near = [line[1] for line in lines if 0.9 * tokens <= line[0] <= 1.02 * tokens]
    return float(np.mean(near)) if near else min(lines, key=lambda line: abs(line[0] - tokens))[1]


def table(runs: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The runs side by side."""
    same = min(run["tokens"] for run in runs.values())
    first = next(iter(runs.values()))
    rows = [
        [
            name,
            run["batch_size"],
            len(run.get("checkpointed", ())),
            f"{run['tokens']:,}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['tokens_per_second'] / first['tokens_per_second']:.2f}",
            format_bytes(run["peak_bytes"]),
            format_bytes(run["footprint_bytes"]),
            f"{loss_at(run['lines'], same):.3f}",
            f"{run['lines'][-1][1]:.3f}",
            "" if not run.get("search_seconds") else format_seconds(run["search_seconds"]),
        ]
        for name, run in runs.items()
    ]
    columns = [
        "run",
        "batch",
        "checkpointed",
        "tokens",
        "tokens/s",
        "ratio",
        "peak",
        "process",
        f"loss at {same:,}",
        "last loss",
        "search",
    ]
    return render_table(columns, rows, title=f"{options.steps} steps of LoRA, rows of {options.length} tokens")


if __name__ == "__main__":
    main()
