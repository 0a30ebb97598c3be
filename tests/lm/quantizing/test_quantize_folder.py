"""From folder to folder: the bits of the way in memory, whatever happens on the way, and never more than a block."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.files.unfinished import Resumable
from mlx_tune.lm.quantizing import folder_store
from mlx_tune.quantization import in_pieces
from mlx_tune.quantization.formats import affine
from mlx_tune.quantization.formats.scale_search import SearchExtent
from mlx_tune.quantization.learning import gptq_model

TEXT = [mx.random.randint(0, 64, (2, 33), key=mx.random.key(seed)) for seed in (1, 2)]


def in_memory(source: Path, target: Path, dtype: str | None = None, **options: Any) -> mt.QuantizationReport:
    """The plain reference."""
    model, tokenizer, config, folder = lm.load(source, lazy=True)
    if dtype is not None:
        from mlx_tune.lm.loading import cast_parameters

        cast_parameters(model, dtype)
    report = mt.quantize_model(model, **options, progress=False)
    lm.save_quantized(target, model, tokenizer, config, source=folder)
    return report


def contents(folder: Path) -> dict[str, Any]:
    """Every tensor with its dtype and bytes, every other file's bytes."""
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            arrays: Any = mx.load(str(file))
            for name, array in arrays.items():
                found[f"{file.name}/{name}"] = (array.dtype, array.shape, bytes(array.reshape(-1).view(mx.uint8)))
        else:
            found[file.name] = file.read_bytes()
    return found


def without_times(report: mt.QuantizationReport) -> dict[str, Any]:
    return {k: v for k, v in report.to_dict().items() if k not in ("seconds", "peak_bytes", "notes")}


@pytest.mark.parametrize("name", ["tied", "untied", "moe", "sharded"])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 3, "group_size": 32, "overrides": {"*.q_proj": {"bits": 8}, "*.layers.1.*": False}},
        {"bits": 2, "method": "nearest", "dtype": "float16", "skip": ["*embed_tokens"]},
        {"mode": "mxfp4", "scale_dtype": "bfloat16"},
        {"bits": 3, "calibration": TEXT},
        {"bits": 3, "method": "gptq", "calibration": TEXT, "overrides": {"*.layers.1.*o_proj": False}},
    ],
    ids=["uniform", "mixed", "nearest", "mxfp4", "learned", "gptq"],
)
def test_the_folder_is_that_of_the_way_in_memory(model_folder, tmp_path: Path, name: str, options: dict) -> None:
    report = lm.quantize_folder(model_folder(name), tmp_path / "out", **options, progress=False)
    expected = in_memory(model_folder(name), tmp_path / "reference", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")
    assert without_times(report) == without_times(expected)
    assert report.peak_bytes is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "reference"]
    mlx_lm.load(str(tmp_path / "out"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many files as a large model has."""
    import mlx_lm.utils

    whole = mlx_lm.utils.make_shards

    def split(weights: dict[str, mx.array], limit: int = 1) -> list[dict[str, mx.array]]:
        parts, size = [], 1 << 20
        for part in whole(weights):
            for path, value in part.items():
                if size + value.nbytes > 40_000:
                    parts.append({})
                    size = 0
                parts[-1][path] = value
                size += value.nbytes
        return parts

    monkeypatch.setattr(mlx_lm.utils, "make_shards", split)


class Stopped(BaseException):
    """As if the process ended here."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed cleans up nothing; the system takes its locks back."""
    monkeypatch.setattr(Resumable, "__exit__", lambda self, *_: os.close(self._lock))


@pytest.mark.usefixtures("small_shards", "killed")
def test_it_goes_on_wherever_it_was_stopped(model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of each line of the journal, and after it."""
    source, target = model_folder("untied"), tmp_path / "out"
    in_memory(source, tmp_path / "reference")
    append, apply, applied = folder_store.append_line, in_pieces.apply_layer, list[str]()

    def count(layer, *rest):
        applied.append(layer.path)
        return apply(layer, *rest)

    def stopping(share: int):
        def stop(path: Path, text: str, *words: str) -> None:
            append(path, text[: len(text) // share], *words)
            raise Stopped

        return stop

    monkeypatch.setattr(in_pieces, "apply_layer", count)
    layers = len(mt.plan_quantization(lm.load(source)[0]).layers)
    for stops in range(2 * (layers + 2)):  # the header, the energies and each layer; half of it, then all of it
        monkeypatch.setattr(folder_store, "append_line", stopping(1 if stops % 2 else 2))
        with pytest.raises(Stopped):
            lm.quantize_folder(source, target, progress=False)
        assert not target.exists()
    assert len(applied) == 2 * layers
    monkeypatch.setattr(folder_store, "append_line", append)
    report = lm.quantize_folder(source, target, progress=False)
    assert contents(target) == contents(tmp_path / "reference")
    assert len(applied) == 2 * layers == 2 * len(report.layers)
    assert f"{layers} of {layers} layers were there from an earlier call" in report.notes[-1]


@pytest.mark.usefixtures("small_shards", "killed")
def test_what_is_learned_goes_on_where_it_was_stopped(model_folder, tmp_path: Path, monkeypatch) -> None:
    source, target, options = model_folder("untied"), tmp_path / "out", {"method": "gptq", "calibration": TEXT}
    in_memory(source, tmp_path / "reference", **options)
    append, solve, solved = folder_store.append_line, gptq_model.quantize_gptq, list[int]()

    def stop(path: Path, text: str, *words: str) -> None:
        append(path, text, *words)
        raise Stopped

    monkeypatch.setattr(gptq_model, "quantize_gptq", lambda *a, **k: solved.append(1) or solve(*a, **k))
    monkeypatch.setattr(folder_store, "append_line", stop)
    for _ in range(12):  # the header, the energies, and ten layers
        with pytest.raises(Stopped):
            lm.quantize_folder(source, target, **options, progress=False)
    with pytest.raises(mt.InvalidArgumentError, match="for another task: calibration was"):
        lm.quantize_folder(source, target, **(options | {"calibration": TEXT[:1]}), progress=False)
    monkeypatch.setattr(folder_store, "append_line", append)
    solved.clear()
    report = lm.quantize_folder(source, target, **options, progress=False)
    assert contents(target) == contents(tmp_path / "reference")
    assert 0 < len(solved) < len(report.layers) - 10


@pytest.mark.usefixtures("small_shards")
def test_a_failure_on_the_way_says_where_its_work_is(model_folder, tmp_path: Path, monkeypatch) -> None:
    target, apply = tmp_path / "deep" / "out", in_pieces.apply_layer
    left = iter(range(3))

    def full(*words):
        next(left)
        return apply(*words)

    monkeypatch.setattr(in_pieces, "apply_layer", full)
    with pytest.raises(StopIteration) as caught:
        lm.quantize_folder(model_folder("wide"), target, progress=False)
    assert "the same call goes on from there" in caught.value.__notes__[0]
    assert [path.name for path in target.parent.iterdir()] == ["out.unfinished"]
    monkeypatch.setattr(in_pieces, "apply_layer", apply)
    with pytest.raises(mt.InvalidArgumentError, match="another task: bits was 4, now it is 3"):
        lm.quantize_folder(model_folder("wide"), target, 3, progress=False)
    report = lm.quantize_folder(model_folder("wide"), target, progress=False)
    assert "3 of " in report.notes[-1]
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert contents(target) != {}


def test_what_cannot_be_done_leaves_nothing(model_folder, tmp_path: Path, monkeypatch) -> None:
    source = model_folder("wide")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(mt.InvalidArgumentError, match="not empty"):
        lm.quantize_folder(source, taken, progress=False)
    with pytest.raises(mt.QuantizationError, match="'dwq' cannot quantize from folder to folder"):
        lm.quantize_folder(source, tmp_path / "out", method="dwq", progress=False)
    with pytest.raises(mt.QuantizationError, match="'gptq' learns from text: pass calibration"):
        lm.quantize_folder(source, tmp_path / "out", method="gptq", progress=False)
    with pytest.raises(mt.QuantizationError, match="bits=7"):
        lm.quantize_folder(source, tmp_path / "out", 7, progress=False)
    monkeypatch.setattr("mlx_tune.files.scratch.free_bytes", lambda folder: 1000)
    with pytest.raises(mt.DiskError, match=r"The quantized model takes .* and .* has 1.00 kB free"):
        lm.quantize_folder(source, tmp_path / "out", progress=False)
    monkeypatch.undo()
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    weights: Any = mx.load(str(broken / "model.safetensors"))
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = mx.nan
    mx.save_safetensors(str(broken / "model.safetensors"), weights)
    with pytest.raises(mt.QuantizationError, match=r"NaN or infinite weights in model.layers.1.mlp.up_proj \(1 of"):
        lm.quantize_folder(broken, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "taken"]


LIMITED = """
import json, os, signal, sys
source, target, method, stop_after = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
import resource
import mlx.core as mx, mlx.nn as nn
import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.lm.quantizing import folder_store
from mlx_tune.quantization.formats import affine
from mlx_tune.quantization.formats.scale_search import SearchExtent
from mlx_tune.quantization.learning import gptq

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

mt.quantize_model(nn.Sequential(nn.Linear(64, 64)), method="nearest", progress=False)  # imports, compiled kernels
tokenizer = lm.load(source, lazy=True)[1]
mx.eval(mx.ones((512, 512)) @ mx.ones((512, 512)))  # OpenBLAS waits for ever for a buffer that it cannot have
before, allowed = status("VmHWM"), int(sys.argv[5])
stacks = 128 << 20  # which count, touched or not
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + allowed + stacks,) * 2)
affine.plan_search = lambda bits, effort: SearchExtent(0.8, 1.0, 1, 1, 1, 1, 0, 0, 0)  # this is about memory
gptq.plan_search = affine.plan_search
gptq._SWEEPS["fast"] = 0
append, done = folder_store.append_line, []

def counted(*words):
    append(*words)
    done.append(1)
    if len(done) == stop_after:
        os.kill(os.getpid(), signal.SIGKILL)

folder_store.append_line = counted
text = [mx.random.randint(0, 320, (4, 129), key=mx.random.key(1))] if method == "gptq" else None
report = lm.quantize_folder(source, target, method=method, calibration=text, progress=False)
print(json.dumps({"risen": status("VmHWM") - before, "notes": report.notes}))
"""


def killed_on_the_way(folder: Path, method: str, layers: int, allowed: int) -> None:
    """Quantize `large` into `out` in a limited process that is killed half way, and in another that goes on."""

    def child(stop_after: int) -> subprocess.CompletedProcess[str]:
        words = [folder / "large", folder / "out", method, stop_after, allowed]
        return subprocess.run(
            [sys.executable, "-c", LIMITED, *map(str, words)], capture_output=True, text=True, check=False
        )

    assert child(stop_after=layers // 2).returncode == -signal.SIGKILL
    assert not (folder / "out").exists()
    done = child(stop_after=-1)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["risen"] < allowed
    assert f"{layers // 2 - 2} of {layers} layers were there" in found["notes"][-1]  # two lines are no layers


@pytest.mark.cpu_only
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("method", ["nearest", pytest.param("optimal", marks=pytest.mark.slow)])
def test_a_model_larger_than_the_process_may_be(model_folder, tmp_path: Path, monkeypatch, method: str) -> None:
    """Killed once on the way, in processes that can hold neither the model nor the quantized one."""
    layers, block, size = large_model(model_folder("untied"), tmp_path / "large")
    allowed = 3 * block // 2 + (48 << 20)  # MLX's cache on CPUs, and the pieces that a layer is worked on in
    assert allowed < size * 9 // 32
    assert allowed + (128 << 20) < size

    killed_on_the_way(tmp_path, method, layers, allowed)
    monkeypatch.setattr(affine, "plan_search", lambda *_: SearchExtent(0.8, 1.0, 1, 1, 1, 1, 0, 0, 0))
    in_memory(tmp_path / "large", tmp_path / "reference", method=method)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


@pytest.mark.cpu_only
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_gptq_on_a_model_larger_than_the_process_may_be(model_folder, tmp_path: Path) -> None:
    """Killed once on the way; what it takes beside a block are moments between a layer's inputs."""
    inner = 768
    layers, block, size = large_model(model_folder("untied"), tmp_path / "large", blocks=72, inner=inner)
    allowed = (
        3 * block // 2 + 10 * 4 * inner**2 + (96 << 20)
    )  # that, MLX's cache, and what the calibration is on disk for
    assert allowed + (128 << 20) < size

    killed_on_the_way(tmp_path, "gptq", layers, allowed)
    mlx_lm.load(str(tmp_path / "out"))


def large_model(source: Path, target: Path, blocks: int = 32, inner: int = 2048) -> tuple[int, int, int]:
    """A model of many blocks in two files; the number of its layers, the bytes of a block, and of all of them."""
    hidden = 512
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks, "head_dim": 256}
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    (target / "config.json").write_text(json.dumps(config))

    def random(i: int, *shape: int) -> mx.array:
        return (mx.random.normal(shape, key=mx.random.key(i)) / 30).astype(mx.bfloat16)

    heads = {"q_proj": 2, "k_proj": 1, "v_proj": 1}
    block = {f"self_attn.{name}.weight": random(i, n * 256, hidden) for i, (name, n) in enumerate(heads.items())}
    block["self_attn.o_proj.weight"] = random(4, hidden, 512)
    block |= {f"mlp.{name}.weight": random(i, inner, hidden) for i, name in enumerate(["up_proj", "gate_proj"])}
    block["mlp.down_proj.weight"] = random(5, hidden, inner)
    norms = ("input_layernorm", "post_attention_layernorm")
    every = {f"model.layers.{i}.{name}": w for i in range(blocks) for name, w in block.items()}
    every |= {f"model.layers.{i}.{name}.weight": mx.ones(hidden) for i in range(blocks) for name in norms}
    every |= {"model.norm.weight": mx.ones(hidden)}
    every |= {f"{name}.weight": random(6, 320, hidden) for name in ("model.embed_tokens", "lm_head")}
    names = list(every)
    for i, part in enumerate([names[::2], names[1::2]], start=1):
        mx.save_safetensors(str(target / f"model-{i:05d}-of-00002.safetensors"), {name: every[name] for name in part})
    size = sum(w.nbytes for w in block.values())
    return 7 * blocks + 2, size, blocks * size
