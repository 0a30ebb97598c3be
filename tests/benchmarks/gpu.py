"""The figures on a GPU: python tests/benchmarks/gpu.py [--quick] [--only SECTION ...] [--models 1B 8B] [--json FILE]

Correctness first, then tables; each pair that is compared was measured in this run. `--quick` runs every section at
toy sizes, on any machine, to see that it runs; its figures mean nothing. `--models 1B` leaves the larger model out,
where minutes on a GPU are dear. Figures are written after each section, so that a run that is cut short keeps them.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from typing import Any

import gpu_quantizing
import gpu_training
import mlx.core as mx
import mlx.nn as nn
from gpu_measuring import GB, release, training
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.devices import machine
from mlx_tune.presentation.tables import render_table
from mlx_tune.units import format_seconds


def correctness(models: tuple[str, ...]) -> dict[str, Any]:
    """Equalities that everything else leans on."""
    checks = {}
    job = training("tiny")
    batch = job.make_batch(2)
    lora = training("tiny", lora=True)
    for name, checked in (("plain blocks'", job), ("those of adapters with dropout", lora)):

        def loss_of(tokens: mx.array, model: nn.Module = checked.model) -> mx.array:
            logits = model(tokens[:, :-1]).astype(mx.float32)
            return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

        report = mt.verify_checkpoint(checked.model, loss_of, batch)
        checks[f"checkpointed gradients equal {name}"] = report.ok

    from mlx_tune.quantization.formats.affine import dequantize_float32, quantize_affine

    weight = mx.random.normal((256, 512)).astype(mx.bfloat16)
    x = mx.random.normal((4, 512))  # float32: in bfloat16 the kernel's own rounding would be all there is to see
    for bits in (2, 3, 4, 6, 8):
        codes, scales, biases = quantize_affine(weight, bits, 64)
        wide = (codes, scales.astype(mx.float32), biases.astype(mx.float32))
        fused = mx.quantized_matmul(x, *wide, transpose=True, group_size=64, bits=bits)
        exact = x @ dequantize_float32(codes, scales, biases, bits=bits, group_size=64).T
        # 1e-3: on a GPU float32 products may run in TF32, which carries ten bits.
        close = mx.abs(fused - exact).max() <= 1e-3 * mx.abs(exact).max()
        checks[f"quantized product equals the dequantized one at {bits} bits"] = bool(close.item())

    before = {k: mx.array(v) for k, v in tree_flatten(job.model.parameters())}
    mx.eval(before)
    found = mt.autobatch(job.step, job.make_batch, budget="1GB", max_batch=8, state=job.state, progress=False)
    same = all(mx.array_equal(v, before[k]).item() for k, v in tree_flatten(job.model.parameters()))
    checks[f"autobatch (found {found.batch_size}) leaves every parameter as it was"] = same
    print(render_table(["check", "holds"], [[k, "yes" if v else "NO"] for k, v in checks.items()]))
    return {"checks": checks}


def recovery(models: tuple[str, ...]) -> dict[str, Any]:
    """A real out-of-memory from plain allocations, and the same step before and after it."""
    job = training("tiny")
    batch = job.make_batch(2)
    mx.eval(batch)
    from mlx_tune.state import Snapshot

    def one() -> list[Any]:
        with Snapshot(job.state):
            loss = job.step(batch)
            mx.eval(loss, job.model.state)
            return [loss.item(), *(mx.array(v) for _, v in tree_flatten(job.model.parameters()))]

    before = one()
    mx.eval(before[1:])
    raised = None
    if machine().backend == "cuda":
        held = []
        try:
            while True:
                held.append(mx.ones((4000, GB // 1000), mx.uint8))
                mx.eval(held[-1])
        except RuntimeError as error:
            raised = str(error)
        del held
        release()
    after = one()
    pairs = zip(before[1:], after[1:], strict=True)
    same = before[0] == after[0] and all(mx.array_equal(a, b).item() for a, b in pairs)
    print(f"\nout of memory on purpose: {raised}\nthe step afterwards is bit-identical: {same}")
    if raised is not None:
        print(mt.explain(RuntimeError(raised)))
    return {"raised": raised, "identical": same}


SECTIONS = {
    "correctness": correctness,
    "checkpointing": gpu_training.checkpointing,
    "quantizing": gpu_quantizing.quantizing,
    "autobatch": gpu_training.autobatch,
    "recovery": recovery,
    "estimates": gpu_training.estimates,
    "kernels": gpu_quantizing.kernels,
    "plans": gpu_training.plans,
    "autofit": gpu_training.autofit,
}


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--models", nargs="+", choices=["1B", "8B"], default=["1B", "8B"])
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    models = ("tiny",) if arguments.quick else tuple(arguments.models)
    results: dict[str, Any] = {"machine": machine().to_dict(), "mlx": mx.__version__, "models": models}
    print(f"{machine()}, mlx {mx.__version__}")
    for name in arguments.only:
        print(f"\n== {name}: {SECTIONS[name].__doc__}")
        started = time.perf_counter()
        try:
            results[name] = SECTIONS[name](models)
        except Exception as error:  # one section that fails must not take the others' figures with it
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"({format_seconds(time.perf_counter() - started)})", flush=True)
        release()
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(results, file, indent=2, default=str)


if __name__ == "__main__":
    main()
