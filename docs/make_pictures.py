"""Make the pictures of these pages again, each for light and for dark pages: python docs/make_pictures.py [NAME ...]

Names: step-memory, autobatch, quantization, wiring; all of them by default. `quantization` draws
docs/assets/quantization.json, rows of what `tests/benchmarks/quantization.py --json` writes, without their windows and
with "mixed optimal" named "mixed". The others predict or measure here; look at the words under `autobatch` afterwards,
since the sizes that a search tries depend on what it measures.
`--suffix .png --to FOLDER` is for looking at them elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "benchmarks"))

import loss
import mlx.core as mx
from workloads import WORKLOADS

import mlx_tune as mt
from mlx_tune.presentation.plotting import COLORS, ink, new_figure, save_figure

ASSETS = Path(__file__).resolve().parent / "assets"

#: Draws a picture, for dark pages or for light ones.
Draw = Callable[[bool], Any]

#: The methods of quantization in the picture: this library's in solid lines, mlx-lm's in dotted ones.
METHODS = {
    "nearest": (COLORS[3], "-"),
    "optimal": (COLORS[0], "-"),
    "optimal best": (COLORS[0], "--"),
    "gptq": (COLORS[2], "-"),
    "dwq": (COLORS[4], "-"),
    "mlx-lm gptq": (COLORS[2], ":"),
    "mlx-lm awq": (COLORS[1], ":"),
    "mlx-lm dwq": (COLORS[4], ":"),
    "mixed": (COLORS[5], "-"),
    "mlx-lm dynamic": (COLORS[5], ":"),
}


def step_memory() -> dict[str, Draw]:
    """Memory over a training step of a Llama, plain and with every block checkpointed, at the same scale.

    And over one with a large vocabulary, with its logits held and without, at a scale of their own.
    """
    estimates = {}
    for name, checkpointed in (("step-memory", False), ("step-memory-checkpointed", True)):
        workload = WORKLOADS["llama-f32-adamw"]()
        if checkpointed:
            mt.checkpoint_blocks(workload.model)
        batch = workload.make_batch(workload.batch_size)
        estimates[name] = mt.estimate_memory(workload.step, batch, state=workload.state)
    with_vocabulary = {}
    for name, kind in (("step-memory-logits", "plain"), ("step-memory-no-logits", "linear_cross_entropy")):
        model = loss.qwen_shape(5)
        optimizer = loss.lora(model)
        model.train()
        mt.checkpoint_blocks(model)
        step = loss.step_of(model, loss.LOSSES[kind], optimizer)
        tokens = mt.ArraySpec((1, 2049), mx.int32)
        with_vocabulary[name] = mt.estimate_memory(step, tokens, state=(model, optimizer))

    def draw(estimate: mt.MemoryEstimate, top: float, dark: bool) -> Any:
        figure = estimate.plot(dark=dark)
        axes = figure.axes[0]
        axes.set_ylim(0, top / (1e9 if "(GB)" in axes.get_ylabel() else 1e6))
        return figure

    drawn: dict[str, Draw] = {}
    for both in (estimates, with_vocabulary):
        top = 1.12 * max(estimate.floor_bytes for estimate in both.values())
        drawn |= {name: lambda dark, it=estimate, top=top: draw(it, top, dark) for name, estimate in both.items()}
    return drawn


def autobatch() -> dict[str, Draw]:
    """The trials of one search against the line that was foreseen."""
    workload = WORKLOADS["mlp-f32-adamw"]()
    result = mt.autobatch(
        workload.step,
        workload.make_batch,
        budget="60MB",
        max_batch=16384,
        multiple_of=64,
        state=workload.state,
        progress=False,
    )
    print(result)
    return {"autobatch": lambda dark: result.plot(dark=dark)}


def quantization() -> dict[str, Draw]:
    """KL divergence against bits per weight, a line for each method, and how it compares with rounding to nearest."""
    figures = json.loads((ASSETS / "quantization.json").read_text())
    unknown = {row["method"] for row in figures} - set(METHODS)
    assert not unknown, f"methods without a line: {unknown}"
    nearest = {row["asked"]: row["mean_kl"] for row in figures if row["method"] == "nearest"}

    def draw(dark: bool) -> Any:
        figure, above = new_figure(dark=dark, size=(6.4, 6.0), rows=2)
        below = figure.axes[1]
        for method, (color, line) in METHODS.items():
            rows = sorted((r for r in figures if r["method"] == method), key=lambda row: row["bits_per_weight"])
            style = {"label": method, "color": color, "ls": line, "marker": "o", "ms": 4}
            if not rows:
                continue
            bits = [row["bits_per_weight"] for row in rows]
            errors = [row["standard_error"] or math.nan for row in rows]
            above.errorbar(bits, [row["mean_kl"] for row in rows], yerr=errors, **style)
            compared = [
                (row["bits_per_weight"], row["mean_kl"] / nearest[row["asked"]])
                for row in rows
                if row["asked"] in nearest
            ]
            if compared:
                below.plot(*zip(*compared, strict=True), **style)
        above.set_yscale("log")
        above.set_ylabel("mean KL divergence (nats)")
        above.legend(frameon=False, labelcolor=ink(dark), fontsize=9)
        below.set_xlabel("bits per weight, all parameters counted")
        below.set_ylabel("over rounding to nearest")
        below.set_ylim(0, 1.1)
        return figure

    return {"quantization": draw}


def wiring() -> dict[str, Draw]:
    """The process's wired limit while three blocks overlap: this library's registry, and mlx-lm's own context.

    Over the stand-in for Metal that the tests use, so it can be drawn on any machine.
    """
    import pytest
    from metal_stand_in import MetalStandIn
    from mlx_lm.generate import wired_limit as mlx_lm_wired_limit

    # Lazy arrays: what matters is how many bytes they say they have.
    large, small = {"weight": mx.zeros((20, 10**9), mx.uint8)}, {"weight": mx.zeros((8, 10**9), mx.uint8)}
    models = {"A": large, "B": large, "C": small}
    events = ["A in", "B in", "C in", "A out", "C out", "B out"]

    def limits(enter: Callable[[Any], Any]) -> list[float]:
        with pytest.MonkeyPatch.context() as patch:
            metal = MetalStandIn().install(patch)
            blocks: dict[str, ExitStack] = {}
            seen = [metal.limit / 1e9]
            for event in events:
                name, way = event.split()
                if way == "in":
                    blocks[name] = ExitStack()
                    blocks[name].enter_context(enter(models[name]))
                else:
                    blocks.pop(name).close()
                seen.append(metal.limit / 1e9)
        return [*seen, seen[-1]]

    lines = {"mlx-lm": limits(mlx_lm_wired_limit), "mlx_tune": limits(mt.wired_limit)}

    def draw(dark: bool) -> Any:
        figure, axes = new_figure(dark=dark)
        for name, color, line in (("mlx-lm", COLORS[3], "--"), ("mlx_tune", COLORS[0], "-")):
            axes.step(range(len(events) + 2), lines[name], where="post", color=color, ls=line, lw=1.8, label=name)
        axes.set_xticks(range(1, len(events) + 1), events)
        axes.set_xlim(0, len(events) + 1)
        axes.set_ylim(-1, 64)
        axes.set_ylabel("wired limit (GB)")
        axes.set_xlabel("A and B use one model of 20 GB, C another of 8 GB")
        axes.legend(frameon=False, labelcolor=ink(dark), loc="upper left", ncols=2)
        return figure

    return {"wiring": draw}


PICTURES: dict[str, Callable[[], dict[str, Draw]]] = {
    "step-memory": step_memory,
    "autobatch": autobatch,
    "quantization": quantization,
    "wiring": wiring,
}


def main() -> None:
    """Draw the named pictures, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--to", type=Path, default=ASSETS)
    parser.add_argument("--suffix", default=".svg", choices=[".svg", ".png"])
    options = parser.parse_args()
    unknown = set(options.names) - set(PICTURES)
    if unknown:
        parser.error(f"no picture is called {', '.join(sorted(unknown))}: choose from {', '.join(PICTURES)}")
    options.to.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        for title, draw in PICTURES[name]().items():
            for dark in (False, True):
                path = options.to / f"{title}-{'dark' if dark else 'light'}{options.suffix}"
                save_figure(draw(dark), path)
                print(path.name)


if __name__ == "__main__":
    main()
