import getpass
import json
import signal
from dataclasses import replace

import pytest
from bench_answers import answer, interrupted_at

from mlx_tune.bench import run
from mlx_tune.bench.report import BenchMachine
from mlx_tune.bench.sections import choose
from mlx_tune.errors import InvalidArgumentError


def measure(names, **options):
    return run.measure(choose(names), "quick", run.begin(), ask_for=options.pop("ask_for", answer), **options)


def test_sections_are_measured_and_judged_one_after_another():
    seen, started = [], []
    report = measure(
        ["lazy", "kernels", "wiring"], measured=seen.append, starting=lambda section: started.append(section.name)
    )
    assert started == ["lazy", "wiring", "kernels"]
    assert [len(so_far.sections) for so_far in seen] == [1, 2, 3]
    assert seen[-1] == report
    assert [(one.name, one.status, one.size) for one in report.sections] == [
        ("lazy", "measured", "quick"),
        ("wiring", "left out", "quick"),
        ("kernels", "measured", "quick"),
    ]
    assert [row.holds for row in report.rows] == [True, True, False]
    assert (report.sections[0].seconds, report.sections[0].peak_bytes) == (1.5, 4000)
    assert not report.broke
    assert not report.interrupted


def test_the_death_of_a_section_is_a_result_and_the_next_is_measured():
    report = measure(["floors", "kernels"])
    assert [one.status for one in report.sections] == ["broke", "measured"]
    assert "killed by signal 9" in report.sections[0].reason
    assert report.broke


def test_a_file_has_no_names_and_no_paths():
    text = json.dumps(measure(None).to_dict())
    assert "/home" not in text
    assert "models/" not in text
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text
    assert ".../x.metal" in text


@pytest.mark.parametrize(("section", "left"), [("lazy", []), ("floors", ["lazy"]), ("kernels", ["lazy", "wiring"])])
def test_ctrl_c_leaves_what_there_is(section, left):
    seen = []
    report = measure(["lazy", "wiring", "kernels", "floors"][: 3 if section == "kernels" else 4],
                     ask_for=interrupted_at(section), measured=seen.append)  # fmt: skip
    assert report.interrupted
    assert [one.name for one in report.sections] == left
    assert seen[-1] == report, "the file says so, too"


def test_ctrl_c_while_a_file_is_written_waits_for_it():
    written = []

    def measured(report):
        if not written:
            signal.raise_signal(signal.SIGINT)
        written.append(report)

    report = measure(["lazy", "wiring"], measured=measured)
    assert [one.name for one in report.sections] == ["lazy"]
    assert [so_far.interrupted for so_far in written] == [False, True]


def test_an_earlier_file_of_this_machine_is_gone_on_with():
    first = measure(["lazy", "kernels"], ask_for=interrupted_at("kernels"))
    assert first.interrupted
    earlier = replace(first, day="2020-01-01")
    second = run.measure(choose(["wiring"]), "full", run.begin(earlier), ask_for=answer)
    assert [(one.name, one.size) for one in second.sections] == [("lazy", "quick"), ("wiring", "full")]
    assert not second.interrupted
    assert second.day == run.begin().day
    again = run.measure(choose(["lazy"]), "full", second, ask_for=answer)
    assert [(one.name, one.size) for one in again.sections] == [("lazy", "full"), ("wiring", "full")]


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": BenchMachine("metal", "Apple M9", None, None, None, None)},
        {"versions": {"mlx": "0.1"}},
        {"source": "measurements/wiring.md"},
    ],
)
def test_one_of_another_machine_is_refused(changed):
    with pytest.raises(InvalidArgumentError, match="these do not go with: this machine or a version differs"):
        run.begin(replace(run.begin(), **changed))
