from bench_answers import answer

from mlx_tune.bench import run
from mlx_tune.bench.report import BenchMachine, BenchReport
from mlx_tune.bench.sections import choose
from mlx_tune.presentation.tables import fit_to

MAC = BenchMachine("metal", "Apple M9", "applegpu_g20", 64 * 10**9, 48 * 10**9, "macOS 19")


def report(names):
    begun = BenchReport("2026-11-29", "mlx-tune bench", False, MAC, {"mlx": "0.32.4"})
    return run.measure(choose(names), "quick", begun, ask_for=answer)


def test_the_table_has_a_row_for_each_claim():
    with fit_to(78):
        assert str(report(["lazy", "wiring"])) == GOLDEN


def test_a_section_that_broke_is_in_the_table_and_in_the_verdict():
    broken = report(["floors", "kernels"])
    assert "broke: floors" in broken.verdict()
    assert "killed by signal 9" in str(broken)


def test_nothing_measured_is_said():
    assert report([]).verdict() == "nothing was measured"
    assert BenchReport("2026-11-29", "x", True, MAC, {}).verdict() == "interrupted"


def test_the_dictionary_has_the_version_of_its_schema_first():
    found = report(["lazy"]).to_dict()
    assert next(iter(found.items())) == ("schema", 1)
    assert found["machine"]["name"] == "Apple M9"
    assert [row["claim"] for row in found["sections"][0]["rows"]] == [
        "building-takes-no-memory",
        "evaluating-does-the-work",
    ]


GOLDEN = """\
Apple M9, 64.0 GB, 2026-11-29
mlx 0.32.4
section  claim                          measured
-------  -----------------------------  ----------------------------  --------
lazy     Building a graph of            0 B for 10 operations on      holds
         operations takes no memory     1.00 kB
         for their results.
lazy     Evaluating a graph takes       built in 1.00 s, evaluated    holds
         longer than building it.       in 2.00 s
wiring                                  nothing to wire               left out
2 claims measured; holds: 2; left out: wiring.
1.50 s of measuring, sizes quick, at most 4.00 kB of memory."""
