"""`explain`: an MLX error in plain words, and what to do about it."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, replace

from mlx_tune.diagnosis import explanations
from mlx_tune.diagnosis.explanations import KnownError
from mlx_tune.errors import InvalidArgumentError, MlxTuneError
from mlx_tune.presentation.plain import Json

_WIDTH = 80


@dataclass(frozen=True)
class Explanation:
    """The meaning of an error.

    Attributes:
        known: True where it is in the table. If not, `meaning` says so and `remedies` how to find out more.
        name: The kind of error.
        message: The text that was explained.
        meaning: The cause, in plain words.
        remedies: Steps that help, the most likely first.
        sources: Upstream issues and source files.
        also: Other causes that the same text fits, and other errors that stand in it.
    """

    known: bool
    name: str
    message: str
    meaning: str
    remedies: tuple[str, ...]
    sources: tuple[str, ...]
    also: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        """A short text to read, one part for each cause."""
        parts = [self._part(), *(f"It may also be this:\n\n{other._part()}" for other in self.also)]
        return "\n\n".join(parts)

    def _part(self) -> str:
        lines = [self.name, "", *textwrap.wrap(self.meaning, _WIDTH)]
        if self.remedies:
            lines += ["", "What to do:"]
        for number, remedy in enumerate(self.remedies, 1):
            lines += textwrap.wrap(
                remedy, _WIDTH, initial_indent=f" {number}. ", subsequent_indent="    ", break_long_words=False
            )
        if self.sources:
            lines += ["", "See " + " ".join(self.sources)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return asdict(self)


def explain(exception: BaseException | str) -> Explanation:
    """Say what an MLX error means and what to do about it.

    Looks through the exceptions that led to this one too, since libraries often wrap MLX's. Where a text has more than
    one possible cause, all of them are shown.

    Args:
        exception: The exception, or its text, such as the last lines of a log.

    Returns:
        An explanation whose `str` is for reading. One that is not in the table says so: `known` is False.

    Raises:
        InvalidArgumentError: Neither an exception nor text.

    Examples:
        >>> explanation = explain("[metal::malloc] Resource limit (499000) exceeded.")
        >>> explanation.name
        'Too many buffers'
    """
    if not isinstance(exception, BaseException | str):
        raise InvalidArgumentError(f"explain takes an exception or its text, not {type(exception).__name__}.")
    texts = [exception] if isinstance(exception, str) else [_text(one) for one in _chain(exception)]
    found: dict[str, Explanation] = {}
    for text in texts:
        for entry in explanations.find(text):
            found.setdefault(entry.name, _of(entry, text))
    if found:
        first, *others = found.values()
        return replace(first, also=tuple(others))
    if isinstance(exception, MlxTuneError):
        name = type(exception).__name__
        meaning = "mlx_tune raised this itself, and its text says what to change."
        return Explanation(False, name, texts[0], meaning, (str(exception),), ())
    return Explanation(
        False,
        type(exception).__name__ if isinstance(exception, BaseException) else "Not in the table",
        texts[0],
        "This error is not in the table, so there is nothing to say about it that its own text does not.",
        (
            "See whether the installation and the machine are sound: `mlx-tune doctor`.",
            "Look whether it is known: https://github.com/ml-explore/mlx/issues",
            "Report it with what `mlx-tune doctor --issue` prints.",
        ),
        (),
    )


def _of(entry: KnownError, text: str) -> Explanation:
    return Explanation(True, entry.name, text, entry.meaning, entry.remedies, entry.sources)


def _text(exception: BaseException) -> str:
    return f"{type(exception).__name__}: {exception}"


def _chain(exception: BaseException) -> list[BaseException]:
    """The exception, what it was raised from or during, and the members of groups; each once."""
    found: list[BaseException] = []
    queue: list[BaseException | None] = [exception]
    while queue:
        one = queue.pop(0)
        if one is None or any(one is other for other in found):
            continue
        found.append(one)
        queue += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            queue += one.exceptions
    return found
