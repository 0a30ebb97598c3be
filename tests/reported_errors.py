"""Texts of errors as people have reported them, or as MLX's source writes them, and the entries that explain each."""

from typing import NamedTuple

from mlx_tune.diagnosis import explanations


class Reported(NamedTuple):
    """A text, the place it was found, and the names of its causes in their order."""

    text: str
    source: str
    causes: tuple[str, ...]


def reported(source: str, text: str, *causes: str) -> Reported:
    return Reported(text, source, causes)


def causes_of(text: str) -> tuple[str, ...]:
    """The names of the entries that explain a text, in their order."""
    return tuple(entry.name for entry in explanations.find(text))
