"""The page of machines says what their files say, and each file is what the schema says."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_tune.bench.reading import read_report
from mlx_tune.bench.report import BenchReport
from mlx_tune.bench.sections import SECTIONS
from mlx_tune.diagnosis.report import anonymous

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "measurements" / "machines").glob("*.json"))
MADE = runpy.run_path(str(DOCS / "make_machines_page.py"))


def test_the_page_is_made_from_the_files():
    assert MADE["PAGE"].read_text() == MADE["machines_page"](MADE["reports"]()), "run python docs/make_machines_page.py"


def texts(value: object):
    """Every text in a file, keys included."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_a_report_with_no_names_and_no_paths(file):
    report = read_report(file.read_text(), file.name)
    found = json.loads(file.read_text())
    assert json.loads(json.dumps(report.to_dict())) == found
    for text in texts(found):
        assert anonymous(text) == text
        assert not re.search(r"(^|\s)[~/][\w.-]+/|\\Users\\", text), text
    for section in found["sections"]:
        assert section["size"] != "toy"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_rows_are_what_the_figures_say_today(file):
    """A verdict that changed makes the file's rows old: they would be judged anew."""
    report = read_report(file.read_text(), file.name)
    claims = {(section.name, claim.name): claim for section in SECTIONS for claim in section.claims}
    for section in report.sections:
        for row in section.rows:
            claim = claims[section.name, row.claim]
            assert (row.text, row.page) == (claim.text, claim.page)
            verdict = claim.judge(section.figures)
            assert (verdict.measured, verdict.holds) == (row.measured, row.holds), row.claim


def test_every_machine_has_its_row_and_every_claim_its_table():
    page = MADE["PAGE"].read_text()
    overview = page.partition("## All of them")[2].partition("\n## ")[0]
    for file in FILES:
        assert f"(machines/{file.name})" in overview
    for section in SECTIONS:
        assert f"\n## {section.name}\n" in page
        for claim in section.claims:
            assert claim.text in page


def test_a_figure_taken_from_a_page_is_on_that_page():
    for file in FILES:
        report = read_report(file.read_text(), file.name)
        if report.source == "mlx-tune bench":
            continue
        page = (DOCS / report.source).read_text()
        for row in report.rows:
            for figure in re.findall(r"[\d.]+ (?:GB|ms)", row.measured):
                assert figure in page, figure


def test_the_page_says_that_no_mac_is_there_only_as_long_as_that_is_so():
    found: dict[str, BenchReport] = MADE["reports"]()
    name, report = next(iter(found.items()))
    mac = replace(report, machine=replace(report.machine, backend="metal"))
    assert "No Mac is among them" in MADE["machines_page"]({name: report})
    assert "No Mac is among them" not in MADE["machines_page"]({name: report, "mac.json": mac})
