"""The troubleshooting page, made from the checks and the explanations so that it cannot drift from them.

`python -m mlx_tune.diagnosis.page docs/guides/troubleshoot.md` writes it; a test compares.
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_tune.diagnosis.checks import Check, all_checks
from mlx_tune.diagnosis.explanations import ENTRIES, Entry

_INTRODUCTION = """\
<!-- Made by `python -m mlx_tune.diagnosis.page docs/guides/troubleshoot.md`: change the checks, not this page. -->

# Troubleshoot

Two commands find most trouble:

```console
$ mlx-tune doctor                   # what is wrong with the installation or the machine, with a fix for each
$ mlx-tune doctor --explain "TEXT"  # what an error of MLX means
```

The same from Python, for the error that you have just caught:

```python
import mlx.core as mx
import mlx_tune as mt

try:
    mx.quantize(mx.zeros((8, 100)), group_size=64, bits=4)
except ValueError as error:
    print(mt.explain(error))
```

To report a bug, paste what `mlx-tune doctor --issue` prints: the findings, without your name or your paths.
"""

_THEMES = {
    "installation": "Installation",
    "machine": "The machine",
    "gpu": "The GPU",
    "compute": "Computing",
    "bench": "Measurements",
}


def troubleshooting_page() -> str:
    """The page, in Markdown."""
    parts = [_INTRODUCTION, "## Errors\n", _contents(ENTRIES)]
    parts += [_of_entry(entry) for entry in ENTRIES]
    parts.append(
        "## Checks\n\nWhat `mlx-tune doctor` looks at. `--only NAME` makes one of them; words in CAPITALS are filled "
        "in by the doctor.\n"
    )
    for theme, heading in _THEMES.items():
        parts.append(f"### {heading}\n")
        parts += [_of_check(one) for one in all_checks() if one.theme == theme]
    return "\n".join(parts).rstrip() + "\n"


def _contents(entries: Sequence[Entry]) -> str:
    rows = [f"| `{_short(entry.example)}` | [{entry.name}](#{_anchor(entry.name)}) |" for entry in entries]
    return "\n".join(["| it says | it is |", "| --- | --- |", *rows, ""])


def _short(text: str, length: int = 72) -> str:
    text = " ".join(text.replace("|", "/").replace("`", "'").split())  # a row of a table is one line
    return text if len(text) <= length else text[: length - 3].rsplit(" ", 1)[0] + " ..."


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def _of_entry(entry: Entry) -> str:
    remedies = [f"{number}. {_as_markdown(remedy)}" for number, remedy in enumerate(entry.remedies, 1)]
    sources = ", ".join(f"[{_label(source)}]({source})" for source in entry.sources)
    lines = [
        f"### {entry.name}\n",
        f"```text\n{entry.example}\n```\n",
        entry.meaning,
        "",
        *remedies,
        "",
        f"See {sources}.",
    ]
    return "\n".join(lines) + "\n"


def _as_markdown(remedy: str) -> str:
    """A remedy that is a command becomes code; prose has its code marked already."""
    command, _, comment = remedy.partition("   # ")
    is_command = re.match(r"(uv|brew|sudo|export|unset|mlx-tune|arch|with|mx)\b", remedy) is not None
    return (f"`{command.strip()}`" + (f" ({comment})" if comment else "")) if is_command else remedy


def _label(source: str) -> str:
    match = re.search(r"github\.com/([\w.-]+)/([\w.-]+)/(?:issues|pull)/(\d+)", source)
    if match:
        return f"{match[2]}#{match[3]}" if match[1] == "ml-explore" else f"{match[1]}/{match[2]}#{match[3]}"
    return source.rsplit("/", 1)[-1]


def _of_check(one: Check) -> str:
    lines = [f"#### `{one.name}`\n", one.title, ""]
    if one.explanation:
        lines += [one.explanation, ""]
    written = {when: _capitals(it) for when, it in one.remedies.items() if not re.fullmatch(r"\{\w+\}", it)}
    lines += [f"- {f'{when}: ' if len(written) > 1 else ''}{_as_markdown(it)}" for when, it in written.items()]
    return "\n".join(lines).rstrip() + "\n"


def _capitals(remedy: str) -> str:
    names = [name for _, name, _, _ in string.Formatter().parse(remedy) if name]
    return remedy.format(**{name: name.upper() for name in names})


def main(argv: Sequence[str]) -> int:
    """Write the page to the file that is named, or print it."""
    if argv:
        Path(argv[0]).write_text(troubleshooting_page(), encoding="utf-8")
    else:
        print(troubleshooting_page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
