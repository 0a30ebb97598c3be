import json

from mlx_tune.diagnosis.report import CheckResult, Diagnosis, anonymous


def result(name, status, summary="as it is", fix="", theme="machine"):
    return CheckResult(name, theme, status, summary, fix)


def test_what_it_prints():
    diagnosis = Diagnosis(
        (
            result("python", "pass", theme="installation"),
            result("disk", "warn", "5 GB free", "rm -r old\nor more"),
            result("cuda", "fail", "no driver"),
            result("swap", "skip"),
        ),
        {"mlx": "0.32.4", "Python": "3.12.1"},
    )
    assert str(diagnosis) == (
        "mlx 0.32.4, Python 3.12.1\n"
        "\n"
        "installation\n"
        "  ok    python  as it is\n"
        "\n"
        "machine\n"
        "  warn  disk    5 GB free\n"
        "                  -> rm -r old\n"
        "                  or more\n"
        "  FAIL  cuda    no driver\n"
        "  -     swap    as it is\n"
        "\n"
        "1 failed, 1 to look at, 1 passed, 1 does not apply here"
    )
    assert Diagnosis((result("a", "skip"), result("b", "skip")), {}).verdict() == "2 do not apply here"


def test_its_json_keeps_its_keys():
    diagnosis = Diagnosis((result("cuda", "fail", "no driver", "install one"),), {"mlx": "0.32.4"})
    assert json.loads(json.dumps(diagnosis.to_dict())) == {
        "schema": 1,
        "ok": False,
        "versions": {"mlx": "0.32.4"},
        "checks": [
            {
                "name": "cuda",
                "theme": "machine",
                "status": "fail",
                "summary": "no driver",
                "fix": "install one",
                "figures": {},
            }
        ],
    }


def test_a_bug_report_names_nobody(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    monkeypatch.setattr("platform.node", lambda: "anns-laptop.example.org")
    summary = "ann on anns-laptop: /Users/ann/models/x.safetensors and ~/deep/er/y.py are | missing"
    text = Diagnosis((result("disk", "warn", summary),), {"mlx": "0.32.4"}).issue()
    assert "| disk | warn | <name> on <name>: .../x.safetensors and .../y.py are / missing |" in text
    assert "ann" not in text.replace("<name>", "")


def test_words_that_contain_a_name_are_left_whole():
    assert anonymous("a channel of ann", names=["ann"]) == "a channel of <name>"


def test_a_name_in_a_files_name_is_taken_out():
    assert anonymous("/data/ann_7b-ann.gguf of anna", names=["ann"]) == ".../<name>_7b-<name>.gguf of anna"
