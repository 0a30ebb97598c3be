import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_tune as mt
from mlx_tune.diagnosis import check, doctor
from mlx_tune.diagnosis.check import Check, Finding, failed, passed, warned
from mlx_tune.diagnosis.child_answers import child_environment
from mlx_tune.diagnosis.report import CheckResult

FAST = ["python", "architecture", "wheel", "mlx-backend", "mlx-versions", "mlx-files", "one-backend", "mlx-tune-name"]


def make(name="planted", function=lambda: passed("fine"), **kwargs):
    return Check(name, "planted", function, {"do": "do {what}"}, **kwargs)


@pytest.fixture
def plant(monkeypatch):
    """Put checks in place of the real ones."""

    def put(*planted):
        monkeypatch.setattr(check, "all_checks", lambda: planted)

    return put


def test_this_machine_is_sound():
    diagnosis = mt.diagnose(FAST)
    assert [result.name for result in diagnosis.results] == FAST
    assert diagnosis.exit_code == 0, str(diagnosis)


def test_a_check_that_crashes_is_its_own_failure(plant):
    def crash():
        raise ZeroDivisionError("of a check")

    plant(make("first"), make("broken", crash), make("last"))
    diagnosis = mt.diagnose()
    assert [result.status for result in diagnosis.results] == ["pass", "fail", "pass"]
    assert "the check itself broke: ZeroDivisionError: of a check" in diagnosis["broken"].summary


def test_a_check_that_lacks_a_library_says_how_to_get_it(plant):
    def needs():
        import a_package_that_nobody_has  # noqa: F401

    plant(make("needs", needs))
    result = mt.diagnose()["needs"]
    assert (result.status, result.fix) == ("fail", "uv pip install a_package_that_nobody_has")
    assert result.summary == "it needs a_package_that_nobody_has, which is not installed"


def test_a_remedy_is_filled_in(plant):
    plant(make("first", lambda: warned("hm", "do", {"what": "this"}, figures={"seconds": 3})))
    result = mt.diagnose()["first"]
    assert (result.fix, result.figures) == ("do this", {"seconds": 3})


def test_warnings_do_not_fail_and_failures_do(plant):
    plant(make("first", lambda: warned("hm")))
    assert mt.diagnose().exit_code == 0
    plant(make("first", lambda: warned("hm")), make("second", lambda: failed("no")))
    assert mt.diagnose().exit_code == 1


@pytest.fixture
def child_that(tmp_path):
    """An environment in which `mlx.core` does what the source says, and the check itself does the rest."""

    def make_environment(source):
        (tmp_path / "mlx").mkdir()
        (tmp_path / "mlx" / "__init__.py").write_text("")
        (tmp_path / "mlx" / "core.py").write_text(source)
        home = str(Path(mt.__file__).parent.parent)
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), home])}

    return make_environment


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "killed by signal 6"),
        ("import os; os._exit(7)", "ended with code 7"),
        ("raise RuntimeError('no device')", "RuntimeError: no device"),
    ],
)
def test_a_child_that_dies_is_the_failure_of_its_check(child_that, source, words):
    by_name = {one.name: one for one in check.all_checks()}
    result = doctor.run_in_child(by_name["kernel-cpu"], environment=child_that(source))
    assert result.status == "fail"
    assert words in result.summary


def test_a_child_that_prints_first_is_still_understood(child_that):
    by_name = {one.name: one for one in check.all_checks()}
    result = doctor.run_in_child(by_name["mlx-lm"], environment=child_that("print('hello')"))
    assert result.name == "mlx-lm"


def test_a_child_that_hangs_is_a_failure(child_that, monkeypatch):
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 1)
    by_name = {one.name: one for one in check.all_checks()}
    source = "import threading; threading.Event().wait()"
    result = doctor.run_in_child(by_name["kernel-cpu"], environment=child_that(source))
    assert "did not end within 1 s" in result.summary


def test_where_mlx_cannot_be_imported_what_needs_it_is_skipped(plant):
    def never() -> Finding:
        raise AssertionError("was run")

    plant(make("mlx-import", lambda: failed("it dies")), make("needs", never, in_child=True), make("other"))
    for diagnosis in (mt.diagnose(["mlx-import", "needs"]), mt.diagnose("needs")):
        assert [one.name for one in diagnosis.results] == ["mlx-import", "needs"]  # named or not, it says why
        assert diagnosis["needs"].status == "skip"
        assert "see mlx-import" in diagnosis["needs"].summary
        assert diagnosis.exit_code == 1
    assert [one.name for one in mt.diagnose("other").results] == ["other"]


def test_measurements_are_made_only_when_asked_for(plant):
    plant(make("quick"), make("slow", bench=True))
    assert [one.name for one in mt.diagnose().results] == ["quick"]
    assert [one.name for one in mt.diagnose(bench=True).results] == ["quick", "slow"]
    assert [one.name for one in mt.diagnose(bench="slow").results] == ["slow"]
    assert [one.name for one in mt.diagnose(only="slow").results] == ["slow"]
    assert [one.name for one in mt.diagnose(only=["quick"], bench=["slow"]).results] == ["quick", "slow"]


def test_a_name_that_is_no_check_is_refused_with_those_that_are(plant):
    plant(make("quick"), make("slow", bench=True))
    with pytest.raises(mt.InvalidArgumentError, match=r"no check .quik.\. There are: quick, slow"):
        mt.diagnose("quik")
    with pytest.raises(mt.InvalidArgumentError, match="'quick' is no measurement"):
        mt.diagnose(bench="quick")


def result(name, status, summary="as it is", fix="", theme="machine"):
    return CheckResult(name, theme, status, summary, fix)


def test_the_doctor_imports_neither_mlx_nor_what_needs_it():
    code = (
        "import sys; import mlx_tune.diagnosis, mlx_tune.diagnosis.check as c; c.all_checks();"
        "import mlx_tune.cli.doctor;"
        "print([name for name in sys.modules if name.split('.')[0] in ('mlx', 'mlx_lm', 'numpy', 'rich')])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), check=True
    )
    assert ended.stdout.strip() == "[]"
