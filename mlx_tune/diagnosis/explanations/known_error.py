"""The parts of the table: an error or a family of them, and the symptom under which people look for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

MLX = "https://github.com/ml-explore/mlx/"
MLX_LM = "https://github.com/ml-explore/mlx-lm/"
MLX_VLM = "https://github.com/Blaizzy/mlx-vlm/"
MLX_EXAMPLES = "https://github.com/ml-explore/mlx-examples/"


@dataclass(frozen=True)
class KnownError:
    """One error, or one family of them.

    Attributes:
        name: A short one, as a heading.
        pattern: A regular expression, tried anywhere in the error's text.
        example: A text that MLX really gives.
        meaning: The cause, in plain words.
        remedies: Steps that help, the most likely first.
        sources: The upstream issues or source files that it rests on.
    """

    name: str
    pattern: str
    example: str
    meaning: str
    remedies: tuple[str, ...]
    sources: tuple[str, ...]

    def matches(self, text: str) -> bool:
        """True where the text is one of these errors."""
        return re.search(self.pattern, text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Symptom:
    """The errors that show themselves in one way.

    Attributes:
        name: A word, the file of its page.
        heading: The title of its page.
        about: One sentence that tells it from the others.
        entries: Its errors, the most common first.
    """

    name: str
    heading: str
    about: str
    entries: tuple[KnownError, ...]
