"""The demonstration's text: training documents and held-out ones, from files apart."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.tokens import read_texts

#: Every so many documents one is held out.
_HELD_OUT_EVERY = 12

#: More text than this would only make the demonstration slower.
_MOST_CHARACTERS = 3_000_000

#: Parts of the standard library's folder that are not its source, or that repeat themselves.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents to judge by.

    Attributes:
        training: Texts.
        held_out: Texts of other files.
        source: Where they come from, in words.
    """

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    source: str


def read_corpus(path: str | None) -> Corpus:
    """Read text and set documents aside.

    Args:
        path: A file or a folder; None takes the Python standard library's source on this machine.

    Returns:
        The documents. A single one is cut into pieces first, so that some can be held out.

    Raises:
        InvalidArgumentError: Not enough text.
    """
    texts = _standard_library() if path is None else list(read_texts(path))
    source = "the Python standard library" if path is None else path
    if len(texts) < _HELD_OUT_EVERY:
        texts = _pieces("\n".join(texts))
    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        raise InvalidArgumentError(f"{source!r} holds too little text to train on and to hold some out.")
    held_out = tuple(texts[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]) or (texts[-1],)
    training = tuple(text for text in texts if text not in set(held_out))
    return Corpus(training, held_out, source)


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, characters = [], 0
    for file in sorted(root.rglob("*.py")):
        if _LEFT_OUT & set(file.relative_to(root).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a file in another encoding is no loss among hundreds
        texts.append(text)
        characters += len(text)
        if characters > _MOST_CHARACTERS:
            break
    return texts


def _pieces(text: str) -> list[str]:
    """One long text in as many pieces as two rounds of holding out need, cut between lines."""
    lines = text.splitlines(keepends=True)
    size = max(1, -(-len(lines) // (2 * _HELD_OUT_EVERY)))
    return ["".join(lines[i : i + size]) for i in range(0, len(lines), size)]
