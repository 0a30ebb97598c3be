import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_tune
from mlx_tune.cli import doctor
from mlx_tune.diagnosis import check
from mlx_tune.diagnosis.check import Check, failed, passed


def call(*argv):
    import argparse

    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers(dest="command"))
    return doctor.run(parser.parse_args(["doctor", *argv]))


@pytest.fixture
def planted(monkeypatch):
    everything = (
        Check("good", "planted", lambda: passed("fine"), {}),
        Check("bad", "planted", lambda: failed("no", "do"), {"do": "mend it"}),
        Check("long", "planted", lambda: passed("3 s"), {}, bench=True),
    )
    monkeypatch.setattr(check, "all_checks", lambda: everything)


def test_the_exit_code_is_1_only_for_a_failure(planted, capsys):
    assert call("--only", "good") == 0
    assert call() == 1
    assert "-> mend it" in capsys.readouterr().out


def test_json(planted, capsys):
    call("--json")
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert [one["name"] for one in document["checks"]] == ["good", "bad"]


def test_measurements(planted, capsys):
    assert call("--bench", "long") == 0
    assert "good" not in capsys.readouterr().out
    call("--bench")
    assert "long" in capsys.readouterr().out


def test_an_issue_is_markdown(planted, capsys):
    call("--issue")
    assert "| bad | fail | no |" in capsys.readouterr().out


def test_the_list_of_checks(capsys):
    assert call("--list") == 0
    assert "mlx-import" in capsys.readouterr().out
    call("--list", "--json")
    assert {"name", "theme", "bench", "title"} == set(json.loads(capsys.readouterr().out)[0])


def test_an_error_is_explained(capsys):
    assert call("--explain", "[metal::malloc] Resource limit (499000) exceeded.") == 0
    assert capsys.readouterr().out.startswith("Too many buffers")


def test_it_works_where_importing_mlx_kills_the_process(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    (tmp_path / "mlx" / "core.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    home = str(Path(mlx_tune.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), home])}
    command = [sys.executable, "-m", "mlx_tune", "doctor", "--json", "--only", "python", "mlx-import", "kernel-cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1, ended.stderr
    statuses = {one["name"]: one["status"] for one in json.loads(ended.stdout)["checks"]}
    assert statuses == {"python": "pass", "mlx-import": "fail", "kernel-cpu": "skip"}
