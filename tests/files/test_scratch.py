"""Files that wait on disk: where they go, and what is said where they cannot be written, in every place that writes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_tune.errors import DiskError
from mlx_tune.files import scratch


@pytest.mark.parametrize("variable", ["", "elsewhere"])
def test_files_that_free_memory_are_not_put_into_it(tmp_path, monkeypatch, variable):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "disk").mkdir()
    mounts = tmp_path / "mounts"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, variable)

    def folder(*lines: str) -> str:
        mounts.write_text("\n".join(lines))
        return scratch.scratch_folder(mounts, tmp_path / "disk").name

    inside = "tmp" if variable else "disk"  # whoever names a folder means it
    assert folder(f"tmpfs {tmp_path}/tmp tmpfs rw 0 0", "/dev/sda / ext4 rw 0 0") == inside
    assert folder("tmpfs / tmpfs rw 0 0", f"/dev/sdb {tmp_path}/disk ext4 rw 0 0") == inside
    assert folder(f"tmpfs {tmp_path} tmpfs rw 0 0") == "tmp"  # the other is no better
    assert folder("/dev/sda / ext4 rw 0 0") == "tmp"
    assert folder(f"tmpfs {tmp_path}/tmp tmpfs rw 0 0", f"/dev/sdb {tmp_path}/tmp ext4 rw 0 0") == "tmp"
    assert scratch.scratch_folder(tmp_path / "nowhere", tmp_path / "disk").name == "tmp"


def with_free(monkeypatch, free):
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    with_free(monkeypatch, 1000)
    files = scratch.ScratchFiles("The test", name="test", folder=tmp_path)
    for attempt in (lambda: files.save({"a": mx.zeros(1000)}), lambda: files.reserve(4000)):
        with pytest.raises(
            DiskError, match=r"The test takes 4\.00 kB on disk, and .* has 1\.00 kB free\. Set TMPDIR"
        ) as full:
            attempt()
        assert (full.value.folder, full.value.needed_bytes, full.value.free_bytes) == (str(tmp_path), 4000, 1000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "refusal",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[write] Unable to write 4128862 bytes to file."),
        RuntimeError("[save_safetensors] Failed to open file /somewhere/a.safetensors"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_refusal_found_out_late_is_said_with_the_place_and_the_way_out(tmp_path, refusal):
    with (
        pytest.raises(
            DiskError, match=r"takes 7 B on disk.*The system refused to write.*quota.*ulimit -f.*Elsewhere"
        ) as full,
        scratch.writing(tmp_path, "The test", needed_bytes=7, way_out="Elsewhere."),
    ):
        raise refusal
    assert full.value.__cause__ is refusal
    assert str(tmp_path) in str(full.value)


@pytest.mark.parametrize(
    "other",
    [
        RuntimeError("[matmul] shapes"),
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/data"),
        KeyError("x"),
    ],
    ids=str,
)
def test_other_errors_pass(tmp_path, other):
    with pytest.raises(type(other)) as raised, scratch.writing(tmp_path, "The test"):
        raise other
    assert raised.value is other


def test_a_folder_that_is_not_there_or_cannot_be_written_to_is_named(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(DiskError, match=f"{missing}.*No such file"):
        scratch.ScratchFiles("The test", name="test", folder=missing).save({"a": mx.zeros(1)})
    assert scratch.free_bytes(missing / "deeper") > 0


def test_without_any_temporary_folder_the_error_says_so(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(DiskError, match=r"No usable temporary directory found in \['/tmp'\]\. Set TMPDIR"):
        scratch.scratch_folder()


def test_files_are_kept_apart_and_deleted(tmp_path):
    files = scratch.ScratchFiles("The test", name="test", folder=tmp_path)
    first, second = files.save({"a": mx.ones(2)}), files.save({"a": mx.zeros(2)})
    assert mx.load(str(first))["a"].tolist() == [1, 1]
    assert mx.load(str(second))["a"].tolist() == [0, 0]
    files.close()
    files.close()
    assert not list(tmp_path.iterdir())


#: What a user runs, in a process that may write files of no more than so many bytes.
PREAMBLE = """
import os, resource, sys
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
import mlx_tune as mt
from mlx.utils import tree_flatten

mx.random.seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(3)))
optimizer = optim.SGD(0.1)
mx.eval(model.parameters())
gradients = nn.value_and_grad(model, lambda x: model(x).square().mean())
def step(x):
    loss, grads = gradients(x)
    optimizer.update(model, grads)
    return loss
make_batch = lambda n: mx.ones((n, 128))
options = dict(budget="50MB", state=(model, optimizer), progress=False)
before = {k: v.tolist() for k, v in tree_flatten(model.parameters())}
def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
"""

WRITERS = {
    "autobatch": "limit(4096); mt.autobatch(step, make_batch, max_batch=2, **options)",
    "plan_checkpoints": "limit(4096); mt.plan_checkpoints(model, step, make_batch, batch_size=2, **options)",
    "autofit": "limit(4096); mt.autofit(model, step, make_batch, max_batch=2, **options)",
    "tightest_limit": "limit(4096); mt.tightest_limit(step, make_batch(2), state=(model, optimizer), progress=False)",
    "a journal": "limit(40); options['state'] = (); "
    "mt.autobatch(lambda x: (x @ x.T).sum(), make_batch, max_batch=2, journal=PLACE + '/search.jsonl', **options)",
    "an evaluation": "from mlx_tune.quantization.models.stored_outputs import OutputStore\nlimit(4096)\n"
    "with OutputStore() as store: store.put([mx.zeros(10_000)])",
    "save_quantized": "nn.quantize(model, 64, 4); limit(4096)\nfrom mlx_tune import lm\n"
    "lm.save_quantized(PLACE + '/model', model, config={'model_type': 'toy'}, source=PLACE)",
    "a picture": "estimate = mt.estimate_memory(step, make_batch(2), state=(model, optimizer)); limit(1024); "
    "estimate.plot(PLACE + '/picture.svg')",
    "a report": "from mlx_tune.cli.output import write_whole; limit(1024)\n"
    "write_whole(PLACE + '/report.json', 'x' * 5000)",
    "an adapter": "from mlx_tune.lm.training import _appearing_whole; from pathlib import Path; limit(4096)\n"
    "with _appearing_whole(Path(PLACE) / 'adapters.safetensors', 65536) as files: "
    "mx.save_safetensors(str(files.staged), {'a': mx.zeros(10_000)})",
}


def run_limited(tmp_path, code):
    """What a process that ran `code` printed, and what it left behind."""
    place, waiting = tmp_path / "place", tmp_path / "waiting"
    place.mkdir()
    waiting.mkdir()
    program = PREAMBLE + f"PLACE = {str(place)!r}\n" + code
    # Python would cut what it compiles of modules short at the limit, and the next process could not import them.
    environment = {**os.environ, "TMPDIR": str(waiting), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    return done, place, waiting


@pytest.mark.parametrize("name", WRITERS)
def test_every_place_that_writes_names_the_folder_the_need_and_the_way_out(tmp_path, name):
    code = textwrap.dedent("""
    try:
    {body}
    except mt.DiskError as error:
        after = {{k: v.tolist() for k, v in tree_flatten(model.parameters())}}
        print("DISK", error.folder, "| unchanged", {unchecked} or after == before, "|", error)
    """).format(body=textwrap.indent(WRITERS[name], "    "), unchecked=name == "save_quantized")
    done, place, waiting = run_limited(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("DISK " + str(place), "DISK " + str(waiting))), done.stdout
    assert "| unchanged True |" in done.stdout
    for word in (" free. ", "The system refused to write", "ulimit -f"):
        assert word in done.stdout
    assert any(word in done.stdout for word in ("TMPDIR", "another", "larger disk"))
    assert [file.name for file in waiting.rglob("*") if file.is_file()] == []
    left = [file for file in place.rglob("*") if file.is_file() and file.stat().st_size]
    assert left == [] or name in ("a picture",), left


def test_quantizing_goes_on_in_memory_and_says_so(tmp_path):
    done, _, waiting = run_limited(
        tmp_path, "limit(4096); print(*mt.quantize_model(model, 4, 64, progress=False).notes)"
    )
    assert done.returncode == 0, done.stderr
    assert "The originals stayed in memory until the end" in done.stdout
    assert str(waiting) in done.stdout
    assert "ulimit -f" in done.stdout
    assert not list(waiting.glob("mlx_tune-*"))


def test_a_journal_whose_line_found_no_room_goes_on_where_it_was(tmp_path):
    code = """
limit(600)
import json
def small(x): return (x.T @ x).sum()  # more than the eight bytes that a GPU takes from a pool
options["state"] = ()
try:
    mt.autobatch(small, make_batch, max_batch=64, journal=PLACE + "/search.jsonl", **options)
except mt.DiskError:
    print("full")
"""
    done, place, _ = run_limited(tmp_path, code)
    assert done.stdout.strip() == "full", done.stderr
    content = (place / "search.jsonl").read_bytes()
    assert content.endswith(b"\n")  # not half a line
    again = PREAMBLE + code.replace("limit(600)", f"PLACE = {str(place)!r}")
    found = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_is_full_although_it_looked_free(monkeypatch, tmp_path):
    def save(path, arrays):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(mx, "save_safetensors", save)
    files = scratch.ScratchFiles("The test", name="test", folder=tmp_path)
    with pytest.raises(DiskError, match=r"The test takes 4 B on disk.*No space left on device"):
        files.save({"a": mx.zeros(1)})
