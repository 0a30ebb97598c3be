from pathlib import Path

from mlx_tune.diagnosis.checks import all_checks
from mlx_tune.diagnosis.explanations import ENTRIES
from mlx_tune.diagnosis.page import main, troubleshooting_page

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "troubleshoot.md"


def test_the_committed_page_is_what_the_checks_and_explanations_make():
    assert PAGE.read_text(encoding="utf-8") == troubleshooting_page(), (
        "run: python -m mlx_tune.diagnosis.page docs/guides/troubleshoot.md"
    )


def test_every_check_and_every_error_is_on_it():
    page = troubleshooting_page()
    for one in all_checks():
        assert f"#### `{one.name}`" in page
    for entry in ENTRIES:
        assert f"### {entry.name}\n" in page
        assert entry.example in page


def test_it_is_written_to_a_file(tmp_path):
    assert main([str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == troubleshooting_page()


def test_it_is_printed(capsys):
    main([])
    assert capsys.readouterr().out == troubleshooting_page()
