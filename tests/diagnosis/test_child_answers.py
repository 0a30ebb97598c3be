import pytest

from mlx_tune.diagnosis.child_answers import MARK, NoAnswerError, ask, child_environment, say


def test_the_answer_is_a_line_behind_a_mark(capsys):
    say({"a": 1})
    assert capsys.readouterr().out == MARK + '{"a": 1}\n'


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of a source text, where the child finds it."""

    def make(source):
        (tmp_path / "asked.py").write_text(f"import sys\nfrom mlx_tune.diagnosis.child_answers import say\n{source}")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{child_environment()['PYTHONPATH']}")
        return "asked"

    return make


def test_the_last_answer_counts_whatever_else_is_printed(module):
    name = module("print('hello')\nsay({'n': 1})\nsay({'words': sys.argv[1:]})\nprint('bye')")
    assert ask(name, "a", "b", seconds=60) == {"words": ["a", "b"]}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os; os._exit(3)", "ended with code 3: it said nothing"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("raise ValueError('mine')", "ended with code 1: ValueError: mine"),
        ("pass", "ended with code 0: it said nothing"),
    ],
)
def test_no_answer_is_an_error_that_says_how_it_ended(module, source, words):
    with pytest.raises(NoAnswerError, match=words):
        ask(module(source), seconds=60)


def test_a_process_that_hangs_is_ended(module):
    with pytest.raises(NoAnswerError, match=r"did not end within 1 s"):
        ask(module("import threading; threading.Event().wait()"), seconds=1)
