"""A checkpoint of several gigabytes quantized in a process that may hold much less, and killed on the way.

    python tests/benchmarks/larger_than_memory.py [--gigabytes 8] [--limit 2GB] [--method nearest] [--folder DIR]

A synthetic model of the Llama family with blocks of 0.4 GB is written, quantized by `lm.quantize_folder` in a child
whose data may not grow past the limit (RLIMIT_DATA), killed half way, and gone on with. Printed: the peak of resident
memory (VmHWM), the promise (1.5 times the largest block plus 1 GB), and the time. Linux only. The disk needs 1.3 times
the size; everything is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from mlx_tune.files.tensor_file import TensorFile
from mlx_tune.lm.small_model import train_tokenizer
from mlx_tune.units import format_bytes, parse_bytes

HIDDEN, INNER, VOCABULARY = 4096, 11008, 320

CHILD = """
import json, os, resource, signal, sys
import mlx.core as mx
from mlx_tune import lm
from mlx_tune.lm.quantizing import folder_store

source, target, method, limit, stop_after = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
mx.eval(mx.ones((512, 512)) @ mx.ones((512, 512)))  # OpenBLAS waits for ever for a buffer that it cannot have
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
append, done = folder_store.append_line, []

def counted(*words):
    append(*words)
    done.append(1)
    if len(done) == stop_after:
        os.kill(os.getpid(), signal.SIGKILL)

folder_store.append_line = counted
report = lm.quantize_folder(source, target, method=method, progress=False)
peak = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak": peak, "seconds": report.seconds, "notes": report.notes}))
"""


def write_model(folder: Path, size: int) -> tuple[int, int, int]:
    """Write the model; returns its layers, the bytes of a block, and of everything."""
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    block = sum(2 * rows * columns for rows, columns in shapes.values())
    blocks = max(1, size // block)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": blocks,
        "intermediate_size": INNER,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    train_tokenizer(["memory in a lazy graph can be planned"] * 40, VOCABULARY, folder)
    (folder / "config.json").write_text(json.dumps(config))
    drawn = {shape: mx.random.normal(shape, mx.bfloat16) * 0.02 for shape in set(shapes.values())}  # blocks are alike
    norms = ("input_layernorm", "post_attention_layernorm")
    for i in range(blocks):
        arrays = {f"model.layers.{i}.{name}.weight": mx.zeros(s, mx.bfloat16) for name, s in shapes.items()}
        arrays |= {f"model.layers.{i}.{name}.weight": mx.ones(HIDDEN, mx.bfloat16) for name in norms}
        if i == 0:
            arrays |= {"model.norm.weight": mx.ones(HIDDEN, mx.bfloat16)}
            arrays |= {"model.embed_tokens.weight": mx.zeros((VOCABULARY, HIDDEN), mx.bfloat16)}
        with TensorFile(folder / f"model-{i + 1:05d}-of-{blocks:05d}.safetensors", arrays) as file:
            for name, array in arrays.items():
                file.write(name, drawn.get(array.shape, array))
    return 7 * blocks + 1, block, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Write, quantize, print, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--method", default="nearest", choices=["nearest", "optimal"])
    parser.add_argument("--folder", help="where there is room on disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, target = Path(name) / "source", Path(name) / "target"
        layers, block, size = write_model(source, int(options.gigabytes * 10**9))
        promise = block * 3 // 2 + 10**9
        print(f"{format_bytes(size)} in {layers} layers, blocks of {format_bytes(block)}", flush=True)
        for stop_after in (layers // 2, -1):
            words = [source, target, options.method, parse_bytes(options.limit), stop_after]
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *map(str, words)], capture_output=True, text=True, check=False
            )
            took = time.perf_counter() - began
            if stop_after > 0:
                assert done.returncode == -signal.SIGKILL, done.stderr
                print(f"killed after {took:.0f} s; the target is there: {target.exists()}", flush=True)
                continue
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            made = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            print(f"gone on with and whole after {took:.0f} s more: {format_bytes(made)}; {found['notes'][-1]}")
            print(f"peak of resident memory {format_bytes(found['peak'])}, promised {format_bytes(promise)}")


if __name__ == "__main__":
    main()
