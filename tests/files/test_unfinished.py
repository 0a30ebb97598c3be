"""Folders under temporary names: what a killed process leaves is cleared, what a living one uses is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mlx_tune as mt
from mlx_tune.cli.output import save_plot, write_whole
from mlx_tune.files.scratch import ScratchFiles
from mlx_tune.files.unfinished import UNFINISHED, Resumable, beside, own_folder

HOLDER = """
import sys
from pathlib import Path
from mlx_tune.files.unfinished import own_folder
with own_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "half").write_text("half of it")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path, str], tuple[subprocess.Popen[str], Path]]]:
    """Start a process that holds a folder with something in it."""
    started = []

    def start(place: Path, prefix: str) -> tuple[subprocess.Popen[str], Path]:
        words = [sys.executable, "-c", HOLDER, str(place), prefix]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None
        return child, Path(child.stdout.readline().strip())

    yield start
    for child in started:
        child.kill()
        child.communicate()


class Drawn:
    """A result with a picture."""

    def plot(self, path: Path) -> None:
        path.write_text("<svg/>")


def save_scratch(place: Path) -> None:
    import mlx.core as mx

    files = ScratchFiles("The test", name="test", folder=place)
    files.save({"a": mx.ones(2)})
    files.close()


WRITERS = {
    "report": (UNFINISHED, lambda place: write_whole(place / "report.json", "{}")),
    "picture": (UNFINISHED, lambda place: save_plot(Drawn(), str(place / "layers.svg"))),
    "scratch": ("mlx_tune-test-", save_scratch),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_later_run_clears_what_killed_ones_left_and_not_what_living_ones_use(name: str, tmp_path: Path, hold) -> None:
    prefix, write = WRITERS[name]
    killed, dead = hold(tmp_path, prefix)
    _, alive = hold(tmp_path, prefix)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (dead / "half").exists()
    write(tmp_path)
    assert not dead.exists()
    assert (alive / "half").read_text() == "half of it"
    assert [folder.name for folder in tmp_path.glob(f"{prefix}*")] == [alive.parent.name]


def test_a_folder_of_this_process_is_in_use_too(tmp_path: Path) -> None:
    with own_folder(tmp_path, "a-") as first, own_folder(tmp_path, "a-") as second:
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_left_alone_whatever_their_name(tmp_path: Path) -> None:
    (tmp_path / "a-project").mkdir()
    (tmp_path / "a-project" / "mine").touch()
    (tmp_path / "a-empty").mkdir()
    with own_folder(tmp_path, "a-"):
        pass
    assert {entry.name for entry in tmp_path.iterdir()} == {"a-project", "a-empty"}
    assert (tmp_path / "a-project" / "mine").exists()


def test_other_names_files_and_links_are_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    place = tmp_path / "place"
    place.mkdir()
    (place / "a-file").touch()
    (place / "a-link").symlink_to(elsewhere)
    (place / "b-folder").mkdir()
    with own_folder(place, "a-"):
        pass
    assert {entry.name for entry in place.iterdir()} == {"a-file", "a-link", "b-folder"}
    assert (elsewhere / "mine").exists()


@pytest.mark.parametrize(
    "error",
    [
        lambda path: OSError(28, "No space left on device", path),
        lambda path: RuntimeError(f"[save] Failed to open {path}"),
        lambda path: mt.MlxTuneError(f"cannot load {path!r}"),
    ],
)
def test_errors_name_the_path_that_was_given(tmp_path: Path, error) -> None:
    target = tmp_path / "models" / "mine"
    with pytest.raises(Exception, match="mine") as caught, beside(target, instead=target) as folder:
        raise error(os.fspath(folder / "model.safetensors"))
    text = f"{caught.value} {getattr(caught.value, 'filename', '')}"
    assert UNFINISHED not in text
    assert str(target / "model.safetensors") in text
    assert list(target.parent.iterdir()) == []


def test_work_that_ends_well_or_made_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with Resumable(tmp_path / "out") as work:
        assert (work.folder, work.worth_keeping) == (tmp_path / "out.unfinished", False)
    with pytest.raises(ZeroDivisionError) as caught, Resumable(tmp_path / "out"):
        raise ZeroDivisionError
    assert not hasattr(caught.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def fail_in(target: Path, error: Exception, *, worth_keeping: bool) -> None:
    """Leave something, then fail."""
    with Resumable(target) as work:
        (work.folder / "half").write_text("half of it")
        work.worth_keeping |= worth_keeping
        raise error


def test_work_that_is_worth_it_stays_and_is_found_again(tmp_path: Path) -> None:
    target, folder = tmp_path / "out", tmp_path / "out.unfinished"
    with pytest.raises(ZeroDivisionError) as caught:
        fail_in(target, ZeroDivisionError(), worth_keeping=True)
    assert caught.value.__notes__ == [
        f"What was done so far is in {str(folder)!r}: the same call goes on from there. Delete that folder to "
        "begin anew."
    ]
    with pytest.raises(mt.InvalidArgumentError) as refused:  # a call that is refused does not delete it
        fail_in(target, mt.InvalidArgumentError(), worth_keeping=False)
    assert not hasattr(refused.value, "__notes__")
    assert (folder / "half").read_text() == "half of it"
    with Resumable(target):
        pass
    assert not folder.exists()


def test_one_process_at_a_time_works_there(tmp_path: Path) -> None:
    with Resumable(tmp_path / "out") as work:
        with pytest.raises(mt.InvalidArgumentError, match="Another process is at work in"), Resumable(tmp_path / "out"):
            pass
        assert work.folder.exists()
