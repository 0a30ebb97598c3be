"""Results in a notebook: HTML of the same rows that are printed."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import mlx_tune as mt
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.quantization.judging.speed import SpeedComparison


class Cells(HTMLParser):
    """What a reader of a page sees: the texts of its cells, captions and paragraphs; every tag closed in order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.texts = [], {"th": [], "td": [], "caption": [], "p": []}
        self.sides = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "br":
            self.handle_data("\n")
            return
        self.open.append(tag)
        if tag in self.texts:
            self.texts[tag].append("")
        if tag == "th":
            self.sides.append("right" if "right" in dict(attributes)["style"] else "left")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        place = next((tag for tag in reversed(self.open) if tag in self.texts), None)
        if place is None:
            assert not data.strip(), f"{data!r} stands outside of every cell"
        else:
            self.texts[place][-1] += data


def test_html_holds_the_same_as_the_text_and_nothing_that_runs():
    table = Table(
        ["layer", "<b>bytes</b>"],
        [["  a&b<script>", 12], [None, "-3"]],
        title='one "title"\nof two lines',
        notes=["note <1>", "note\n2"],
    )
    page = Cells(table.to_html())
    assert page.texts == {
        "th": ["layer", "<b>bytes</b>"],
        "td": ["  a&b<script>", "12", "", "-3"],
        "caption": ['one "title"\nof two lines'],
        "p": ["note <1>", "note\n2"],
    }
    assert page.sides == ["left", "right"]
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        Table(["a", "b"], [[1]]).to_html()


def results():
    """One of each result, made as quickly as that can be done."""
    from mlx_tune.bench.report import BenchMachine, BenchReport, Row, SectionResult
    from mlx_tune.diagnosis.report import CheckResult, Diagnosis
    from mlx_tune.lm.capacity.result import Fits, TrainingWay
    from mlx_tune.lm.generation_result import GenerationBatchResult, GenerationTrial
    from mlx_tune.lm.lengths.result import LongestSequence, Way
    from mlx_tune.lm.quantizing.cache_report import CacheCost, CacheReport
    from mlx_tune.lm.training_result import LossReport, TrainingResult
    from mlx_tune.machines.table import find_machine

    mx.random.seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)))
    optimizer = optim.SGD(0.1)
    gradients = nn.value_and_grad(model, lambda x: model(x).square().mean())

    def step(x):
        loss, found = gradients(x)
        optimizer.update(model, found)
        return loss

    def make_batch(n):
        return mx.ones((n, 64))

    state = {"state": (model, optimizer)}
    options = {"budget": "20MB", "progress": False, **state}
    yield mt.estimate_memory(step, make_batch(4), **state)
    yield mt.autobatch(step, make_batch, max_batch=2, **options)
    yield mt.plan_checkpoints(model, step, make_batch, batch_size=2, steps=1, **options)
    yield mt.autofit(model, step, make_batch, max_batch=2, steps=1, **options)
    yield mt.tightest_limit(step, make_batch(4), repeats=1, progress=False, **state)
    yield mt.verify_checkpoint(model, lambda x: model(x).square().mean(), make_batch(2))
    handle = mt.checkpoint_blocks(model)
    yield handle
    handle.undo()
    yield mt.plan_quantization(model, 4, 32)
    report = mt.quantize_model(model, 4, 32, evaluation=[make_batch(2)], progress=False)
    yield report
    yield report.accuracy
    yield Diagnosis((CheckResult("disk", "machine", "warn", "1 GB <free>", "buy\nanother"),), {"mlx": "0.32"})
    yield GenerationBatchResult(
        1, 8, 8, None, 100, 10**9, "given", (GenerationTrial(1, None, 5, 6, 0.1, True),), None, 1.0
    )
    way = TrainingWay("plain", 5, 6, True, 2, 64, False)
    yield Fits("toy", 4, 3, "lora", 1, 32, find_machine("Mac 8GB"), (way,), False, 1.0)
    yield CacheReport((CacheCost(None, None, 128, 1000, None), CacheCost(4, None, 80, 1600, None)), 64, 10**9, 5)
    losses = (LossReport(1, 10, 2.0, 5.0),)
    took = (1, 1, 1, 1, 10, 5.0, 2.0, 1, 1, 1, None, ())
    yield TrainingResult(*took, "nothing wired", "linear", "no row cut", losses, (), "adapters.safetensors")
    rows = Way("plain", False, None, 33, 10**6)
    yield LongestSequence(33, 1, 1, rows, 10**6, 1.0, 10**9, (rows,), "no row cut")
    yield mt.tile_blocks(model, 16, select="layers.*")
    row = Row("floor", "It is so.", "index.md", "as said", True)
    section = SectionResult("floors", "quick", "measured", "", 1.0, 10**6, (row,), {})
    yield BenchReport("2026-11-29", "x", False, BenchMachine("cpu", "EPYC", None, None, None, None), {}, (section,))


def test_every_result_is_shown_in_a_notebook_as_it_is_printed():
    shown = set()
    for result in results():
        assert isinstance(result, Tabular)
        page = Cells(result._repr_html_())
        assert page.texts["td"] or type(result).__name__ == "CheckpointHandle"
        printed = re.sub(r"\s+", " ", str(result))
        for text in itertools.chain.from_iterable(page.texts.values()):
            assert re.sub(r"\s+", " ", text).strip() in printed or isinstance(result, mt.diagnosis.report.Diagnosis), (
                text
            )
        assert isinstance(json.dumps(result.to_dict()), str)
        shown.add(type(result))
    assert {kind for kind in _below(Tabular) if "Accuracy" not in kind.__name__} - shown == {SpeedComparison}


def _below(kind):
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def test_everything_that_prints_a_table_is_a_result_of_this_kind():
    for file in Path(mt.__file__).parent.rglob("*.py"):
        text = file.read_text()
        if "cli" not in file.parts and file.name not in ("tables.py", "tabular.py"):
            assert "render_table" not in text, f"{file.name} prints a table that a notebook does not show"
