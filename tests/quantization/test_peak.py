"""What the process takes, in a child of its own: nothing else can hide in its peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS, WIDTH = 16, 2048
LAYER = WIDTH * WIDTH * 2
MODEL = LAYERS * LAYER
#: Of every 16 bits 4.5 are left.
PACKED = MODEL * 9 // 32
#: MLX's cache on CPUs, 32 MiB, and the pieces that a layer is worked on in.
SLACK = 80 << 20

CHILD = """
import json, resource, sys
import mlx.core as mx, mlx.nn as nn
import mlx_tune as mt
from mlx_tune.quantization import methods
import mlx_tune.quantization.judging.timed_runs as timed_runs
import mlx_tune.quantization.models.sites as sites

sites.ROOM_BYTES = 16 << 20  # so that a model of this size is held back
timed_runs._SECONDS = 0.0  # it is timed once: this is about memory
file, layers, width, way = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def __call__(self, x):
        return self.inner(x)

model = nn.Sequential(*(Block(width) for _ in range(layers)))
model.load_weights(file)
if way in ("loaded", "failing"):
    mx.eval(model.parameters())
if way == "failing":
    real, done = methods.install, []
    def install(*arguments):
        done.append(1)
        if len(done) == layers:
            raise MemoryError
        real(*arguments)
    methods.install = install

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

mt.quantize_model(nn.Sequential(nn.Linear(64, 64)), method="nearest", progress=False)  # imports, compiled kernels
before, active = peak(), mx.get_active_memory()
try:
    with mt.track_memory() as memory:
        evaluation = [mx.ones((2, width), dtype=mx.bfloat16)] if way == "judged" else None
        mt.quantize_model(model, 4, 64, method="nearest", evaluation=evaluation, progress=False)
except MemoryError:
    pass
after = mx.get_active_memory()
print(json.dumps({"risen": peak() - before, "peak": memory.peak_bytes, "active": active, "after": after}))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import mlx.core as mx

    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    layer = (mx.random.normal((WIDTH, WIDTH), key=mx.random.key(0)) / 45).astype(mx.bfloat16)
    mx.save_safetensors(str(file), {f"layers.{i}.inner.weight": layer for i in range(LAYERS)})
    return file


def measured(weights: Path, way: str) -> dict[str, int]:
    arguments = [sys.executable, "-c", CHILD, str(weights), str(LAYERS), str(WIDTH), way]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.cpu_only
def test_a_lazily_loaded_model_is_never_in_memory(weights: Path) -> None:
    found = measured(weights, "lazy")
    assert found["active"] < LAYER  # nothing has been read
    assert found["peak"] < PACKED + 3 * LAYER
    assert found["risen"] < PACKED + LAYER + SLACK < MODEL


@pytest.mark.cpu_only
def test_one_that_is_evaluated_is_in_memory_once(weights: Path) -> None:
    found = measured(weights, "judged")
    assert found["active"] < LAYER
    # Running ahead, MLX holds float32 copies of all layers at once, which makes three times the model.
    assert found["peak"] < MODEL + 12 * LAYER < 2 * MODEL
    assert found["after"] < PACKED + LAYER


@pytest.mark.cpu_only
@pytest.mark.parametrize("way", ["loaded", "failing"])
def test_a_loaded_one_never_takes_more_than_itself_and_a_block(weights: Path, way: str) -> None:
    found = measured(weights, way)
    assert found["active"] >= MODEL
    assert found["peak"] < MODEL + 3 * LAYER
    assert found["risen"] < LAYER + SLACK
    assert found["after"] < PACKED + LAYER if way == "loaded" else found["after"] >= MODEL
