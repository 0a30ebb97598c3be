from pathlib import Path

from mlx_tune.diagnosis.check import all_checks
from mlx_tune.diagnosis.explanations import SYMPTOMS
from mlx_tune.diagnosis.troubleshooting_pages import main, troubleshooting_pages

FOLDER = Path(__file__).parents[2] / "docs" / "guides" / "troubleshoot"


def contents(folder):
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def test_the_committed_pages_are_what_the_checks_and_explanations_make():
    assert contents(FOLDER) == troubleshooting_pages(), (
        "run: python -m mlx_tune.diagnosis.troubleshooting_pages docs/guides/troubleshoot"
    )


def test_every_check_and_every_error_is_on_them():
    pages = troubleshooting_pages()
    for one in all_checks():
        assert f"### `{one.name}`" in pages["checks.md"]
    for symptom in SYMPTOMS:
        for entry in symptom.entries:
            assert f"[{entry.name}]({symptom.name}.md#" in pages["index.md"]
            assert f"## {entry.name}\n" in pages[f"{symptom.name}.md"]
            assert entry.example in pages[f"{symptom.name}.md"]


def test_every_page_is_in_the_navigation():
    navigation = (Path(__file__).parents[2] / "mkdocs.yml").read_text(encoding="utf-8")
    for name in troubleshooting_pages():
        assert f"guides/troubleshoot/{name}" in navigation


def test_they_are_written_to_a_folder(tmp_path):
    assert main([str(tmp_path)]) == 0
    assert contents(tmp_path) == troubleshooting_pages()


def test_they_are_printed(capsys):
    main([])
    assert capsys.readouterr().out == "".join(f"{page}\n" for page in troubleshooting_pages().values())
