from pathlib import Path

import mlx.core as mx
import pytest

from mlx_tune.bench.sections import SECTIONS, choose
from mlx_tune.bench.sizes import TOY, LeftOutError
from mlx_tune.bench.verdicts import Verdict
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.memory import track_memory

DOCS = Path(__file__).parents[2] / "docs"
CLAIMS = [claim for section in SECTIONS for claim in section.claims]


def test_names_are_there_once():
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_is_a_sentence_of_a_page(claim):
    assert (DOCS / claim.page).is_file()
    assert claim.text.endswith(".")
    assert claim.text[0].isupper()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_section_is_measured_and_judged_within_its_bound(section):
    with track_memory() as memory:
        try:
            figures = section.measure(TOY, TOY.most_bytes)
        except LeftOutError as error:
            reason = str(error)
            figures = None
    if figures is None:
        assert section.name == "wiring", reason
        return
    assert memory.peak_bytes <= TOY.most_bytes
    for claim in section.claims:
        verdict = claim.judge(figures)
        assert isinstance(verdict, Verdict)
        assert verdict.measured


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_what_does_not_fit_is_left_out_before_anything_is_made(section):
    with track_memory() as memory:
        before = mx.get_active_memory()
        with pytest.raises(LeftOutError):
            section.measure(TOY, 10)
    assert memory.peak_bytes - before < 10_000


def test_sections_come_in_the_order_of_the_table():
    assert choose(None) == SECTIONS
    assert [section.name for section in choose(["kernels", "lazy", "kernels"])] == ["lazy", "kernels"]
    with pytest.raises(InvalidArgumentError, match=r"There is no section 'speed'\. There are: lazy, unified, floors"):
        choose(["speed"])
