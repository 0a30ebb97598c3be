import json

import pytest
from bench_answers import answer, interrupted_at

from mlx_tune.bench import run
from mlx_tune.bench.reading import read_report
from mlx_tune.cli import main


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path):
    """Sections that answer at once, in a folder of their own."""
    monkeypatch.setattr(run, "_ask", answer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_table_the_file_and_where_to_send_it(planted, capsys):
    assert main(["bench", "--quick", "--only", "lazy", "wiring", "kernels"]) == 0
    out, err = capsys.readouterr()
    assert "does not hold" in out
    assert "mlx-tune-bench.json" in err
    assert "docs/measurements/machines/" in err
    report = read_report((planted / "mlx-tune-bench.json").read_text())
    assert [one.name for one in report.sections] == ["lazy", "wiring", "kernels"]
    assert {one.size for one in report.sections} == {"quick"}


def test_json_is_what_the_file_holds(planted, capsys):
    assert main(["bench", "--only", "lazy", "--json", "--out", "mine.json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((planted / "mine.json").read_text())


def test_a_section_that_dies_is_code_1(capsys):
    assert main(["bench", "--only", "lazy", "floors"]) == 1
    assert "broke: floors" in capsys.readouterr().out.replace("\n", " ")


def test_ctrl_c_leaves_a_file_and_a_table(planted, monkeypatch, capsys):
    monkeypatch.setattr(run, "_ask", interrupted_at("kernels"))
    assert main(["bench", "--only", "lazy", "kernels"]) == 130
    assert "interrupted" in capsys.readouterr().out
    report = read_report((planted / "mlx-tune-bench.json").read_text())
    assert report.interrupted
    assert [one.name for one in report.sections] == ["lazy"]
    monkeypatch.setattr(run, "_ask", answer)
    assert main(["bench", "--only", "kernels"]) == 0
    report = read_report((planted / "mlx-tune-bench.json").read_text())
    assert not report.interrupted
    assert [one.name for one in report.sections] == ["lazy", "kernels"]


def test_a_file_that_is_none_of_ours_is_refused_and_left(planted, capsys):
    (planted / "notes.json").write_text('{"mine": 1}')
    assert main(["bench", "--out", "notes.json"]) == 2
    assert "--out 'notes.json' has schema None" in capsys.readouterr().err
    assert (planted / "notes.json").read_text() == '{"mine": 1}'


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(capsys):
    assert main(["bench", "--out", "/dev/null/x.json"]) == 2
    assert "no folder that can be written to" in capsys.readouterr().err


def test_the_list_of_sections(capsys):
    assert main(["bench", "--list"]) == 0
    assert "autobatch" in capsys.readouterr().out
    assert main(["bench", "--list", "--json"]) == 0
    assert {"section", "claim", "text", "page"} == set(json.loads(capsys.readouterr().out)[0])


def test_a_section_that_is_none_is_refused(capsys):
    assert main(["bench", "--only", "speed"]) == 2
    assert "There is no section 'speed'" in capsys.readouterr().err
