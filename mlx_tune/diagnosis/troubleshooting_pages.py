"""The pages under Troubleshoot, made from the checks and the explanations so that they cannot drift from them.

`python -m mlx_tune.diagnosis.troubleshooting_pages docs/guides/troubleshoot` writes them; a test compares.
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_tune.diagnosis.check import Check, all_checks
from mlx_tune.diagnosis.explanations import SYMPTOMS, KnownError, Symptom

_MAKER = "python -m mlx_tune.diagnosis.troubleshooting_pages docs/guides/troubleshoot"
_MADE = f"<!-- Made by `{_MAKER}`: change its sources instead. -->\n"

_INTRODUCTION = """\
# Troubleshoot

The first of these commands looks for faults of the installation and the machine, and says how to mend each. The
second says what an error means:

```console
$ mlx-tune doctor
$ mlx-tune doctor --explain "There is no Stream(gpu, 0) in current thread."
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

Below is every error that `explain` knows, by symptom. Where one text has several causes, all of them are shown. The
checks of the doctor are on [a page of their own](checks.md). To report a bug, paste the output of
`mlx-tune doctor --issue`: the findings, without your name or your paths.
"""

_CHECKS = """\
# Checks of the doctor

These are the checks of `mlx-tune doctor`. `--only NAME` makes one of them; words in CAPITALS are filled in by the
doctor.
"""

_THEMES = {
    "installation": "Installation",
    "machine": "The machine",
    "gpu": "The GPU",
    "compute": "Computing",
    "bench": "Measurements",
}


def troubleshooting_pages() -> dict[str, str]:
    """The pages, in Markdown, by file name: an index, one for each symptom, and the checks."""
    index = "\n".join([_INTRODUCTION, *(_contents(symptom) for symptom in SYMPTOMS)])
    pages = {
        "index.md": index,
        **{f"{symptom.name}.md": _page(symptom) for symptom in SYMPTOMS},
        "checks.md": _checks(),
    }
    return {name: f"{_MADE}\n{page.rstrip()}\n" for name, page in pages.items()}


def _contents(symptom: Symptom) -> str:
    rows = [
        f"| `{_short(entry.example)}` | [{entry.name}]({symptom.name}.md#{_anchor(entry.name)}) |"
        for entry in symptom.entries
    ]
    table = ["| error | meaning |", "| --- | --- |", *rows]
    return "\n".join([f"## [{symptom.heading}]({symptom.name}.md)\n", f"{symptom.about}\n", *table, ""])


def _page(symptom: Symptom) -> str:
    return "\n".join([f"# {symptom.heading}\n", f"{symptom.about}\n", *(_of_entry(entry) for entry in symptom.entries)])


def _checks() -> str:
    parts = [_CHECKS]
    for theme, heading in _THEMES.items():
        parts.append(f"## {heading}\n")
        parts += [_of_check(one) for one in all_checks() if one.theme == theme]
    return "\n".join(parts)


def _short(text: str, length: int = 72) -> str:
    text = " ".join(text.replace("|", "/").replace("`", "'").split())  # a row of a table is one line
    return text if len(text) <= length else text[: length - 3].rsplit(" ", 1)[0] + " ..."


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def _of_entry(entry: KnownError) -> str:
    remedies = [f"{number}. {_as_markdown(remedy)}" for number, remedy in enumerate(entry.remedies, 1)]
    sources = ", ".join(f"[{_label(source)}]({source})" for source in entry.sources)
    lines = [
        f"## {entry.name}\n",
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
    lines = [f"### `{one.name}`\n", one.title, ""]
    if one.explanation:
        lines += [one.explanation, ""]
    written = {when: _capitals(it) for when, it in one.remedies.items() if not re.fullmatch(r"\{\w+\}", it)}
    lines += [f"- {f'{when}: ' if len(written) > 1 else ''}{_as_markdown(it)}" for when, it in written.items()]
    return "\n".join(lines).rstrip() + "\n"


def _capitals(remedy: str) -> str:
    names = [name for _, name, _, _ in string.Formatter().parse(remedy) if name]
    return remedy.format(**{name: name.upper() for name in names})


def main(argv: Sequence[str]) -> int:
    """Write the pages into the folder that is named, or print them."""
    for name, page in troubleshooting_pages().items():
        if argv:
            Path(argv[0], name).write_text(page, encoding="utf-8")
        else:
            print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
