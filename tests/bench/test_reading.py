import json

import pytest
from bench_answers import answer

from mlx_tune.bench import run
from mlx_tune.bench.reading import read_report
from mlx_tune.bench.sections import choose
from mlx_tune.errors import InvalidArgumentError


@pytest.fixture
def written():
    """A file's contents."""
    report = run.measure(choose(["lazy", "floors", "wiring", "kernels"]), "quick", run.begin(), ask_for=answer)
    return json.loads(json.dumps(report.to_dict()))


def test_a_report_comes_back_as_it_was(written):
    report = read_report(json.dumps(written))
    assert json.loads(json.dumps(report.to_dict())) == written
    assert [one.status for one in report.sections] == ["measured", "broke", "left out", "measured"]


def change(written, path, value):
    *way, last = path
    for step in way:
        written = written[step]
    if value is KeyError:
        del written[last]
    else:
        written[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["schema"], 2, "has schema 2, and this version reads 1"),
        (["schema"], KeyError, "has schema None"),
        (["day"], 3, r"file\.day is 3, and the schema has str"),
        (["user"], "ann", r"has the keys \['day', .*'user'.*\], and the schema has"),
        (["machine", "memory_bytes"], "8 GB", r"machine\.memory_bytes is '8 GB', and the schema has int or null"),
        (["machine", "memory_bytes"], True, r"memory_bytes is True"),
        (["machine", "name"], None, r"machine\.name is None"),
        (["sections"], {}, r"sections is no list"),
        (["sections", 0, "rows", 1, "holds"], "yes", r"sections\[0\]\.rows\[1\]\.holds is 'yes', .* bool or null"),
        (["sections", 0, "rows", 1, "text"], KeyError, r"sections\[0\]\.rows\[1\] has the keys"),
        (["sections", 0, "status"], "fine", "section 'lazy' has status 'fine'"),
        (["sections", 0, "size"], "huge", "section 'lazy' has status 'measured' and size 'huge'"),
        (["sections", 0, "figures"], [], r"figures is \[\], and the schema has dict or null"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_key(written, path, value, words):
    change(written, path, value)
    with pytest.raises(InvalidArgumentError, match=words):
        read_report(json.dumps(written))


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_text_that_is_no_report_is_refused(text):
    with pytest.raises(InvalidArgumentError, match=r"m3\.json (is no JSON|has schema)"):
        read_report(text, "m3.json")
