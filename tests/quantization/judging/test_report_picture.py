from pathlib import Path

import pytest

import mlx_tune as mt


@pytest.mark.parametrize("dark", [False, True])
def test_plot(report: mt.QuantizationReport, tmp_path: Path, dark: bool) -> None:
    figure = report.plot(tmp_path / "report.svg", dark=dark)
    above, below = figure.axes
    assert sum(len(line.get_xdata()) for line in above.lines) == 15
    assert len(below.patches) == 2 * 16
    assert (tmp_path / "report.svg").read_text().startswith("<?xml")
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["before", "now", "left as it is"]
    assert below.get_ylabel() == "kB"
    assert {line.get_label() for line in above.lines} >= {"embed_tokens", "q_proj", "lm_head"}
