"""Batches of tokens out of text files, for training steps, calibration and evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.units import whole_number

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

Source = str | os.PathLike[str]


class Tokenizer(Protocol):
    """The part of a tokenizer that reading text takes."""

    def encode(self, text: str, /) -> Sequence[int]:
        """The tokens of a text."""


def token_batches(
    tokenizer: Tokenizer,
    sources: Source | Iterable[Source],
    *,
    batch_size: int = 8,
    length: int = 256,
    max_batches: int | None = None,
    seed: int | None = None,
) -> list[mx.array]:
    """Cut text into token arrays of one shape.

    Documents are joined with the end-of-text token between them and cut into rows of `length`. The rest
    at the end is dropped, so that every row is full and no padding has to be masked.

    Args:
        tokenizer: mlx-lm's, as `mlx_lm.load` returns it, or any with `encode(text)` and `eos_token_id`.
        sources: A file, a folder (searched for text files, in the order of their names), or several. A `.jsonl`
            file holds one document a line under "text", or "prompt" and "completion", as mlx-lm's data sets do;
            a `.npy` file holds tokens already.
        batch_size: Rows in a batch.
        length: Tokens in a row.
        max_batches: Stop after so many; None takes everything.
        seed: Shuffle the rows with this seed; None keeps the order of the text.

    Returns:
        int32 arrays of shape `[batch_size, length]`.

    Raises:
        InvalidArgumentError: A number below 1, a source that is not there, or too little text for one batch.

    Examples:
        ```python
        batches = lm.token_batches(tokenizer, "corpus/", batch_size=4, length=512)
        ```
    """
    for name, value in (("batch_size", batch_size), ("length", length), ("max_batches", max_batches)):
        if value is not None:
            whole_number(value, name, least=1)
    import mlx.core as mx
    import numpy as np

    paths = _paths(sources)
    # Shuffled rows come from everywhere, so all of the text has to be read for them.
    enough = None if max_batches is None or seed is not None else max_batches * batch_size * length
    tokens = _tokens(tokenizer, paths, enough)
    rows = len(tokens) // length
    if rows < batch_size:
        raise InvalidArgumentError(
            f"{len(tokens)} tokens in {_name(paths)} make {rows} rows of {length}, fewer than one batch of "
            f"{batch_size}: give more text, shorter rows or a smaller batch."
        )
    table = tokens[: rows * length].reshape(rows, length)
    if seed is not None:
        table = table[np.random.default_rng(seed).permutation(rows)]
    count = rows // batch_size if max_batches is None else min(max_batches, rows // batch_size)
    return [mx.array(table[i * batch_size : (i + 1) * batch_size].astype(np.int32)) for i in range(count)]


def read_texts(path: Source) -> Iterator[str]:
    """The documents of a file or of every text file below a folder, one by one.

    Args:
        path: A text file, a `.jsonl` file of documents, or a folder. In a folder, files that are not UTF-8 text are
            passed over; a single file that is not is an error.

    Yields:
        Documents.

    Raises:
        InvalidArgumentError: No file there, or not text.
    """
    place = Path(path)
    if not place.exists():
        raise InvalidArgumentError(f"There is no file or folder {str(path)!r} to read text from.")
    if place.is_dir():
        found = False
        for file in sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            found = True
            yield from _documents(file, text)
        if not found:
            raise InvalidArgumentError(f"No text file lies below the folder {str(path)!r}.")
        return
    try:
        text = place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{str(path)!r} is not UTF-8 text: {error}.") from None
    yield from _documents(place, text)


def _documents(file: Path, text: str) -> Iterator[str]:
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidArgumentError(f"Line {number} of {str(file)!r} is not JSON: {error}.") from None
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            yield record["text"]
        elif isinstance(record, dict) and {"prompt", "completion"} <= record.keys():
            yield f"{record['prompt']}{record['completion']}"
        else:
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise InvalidArgumentError(
                f"Line {number} of {str(file)!r} holds {keys}: a document is under 'text', "
                "or under 'prompt' and 'completion'."
            )


def _tokens(tokenizer: Tokenizer, paths: list[Source], enough: int | None) -> np.ndarray:
    """All tokens of the sources, or the first `enough`."""
    import numpy as np

    parts: list[np.ndarray] = []
    count = 0
    end = getattr(tokenizer, "eos_token_id", None)
    for path in paths:
        for ids in _encoded(tokenizer, path, end):
            parts.append(ids)
            count += len(ids)
            if enough is not None and count >= enough:
                return np.concatenate(parts)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _encoded(tokenizer: Tokenizer, path: Source, end: int | None) -> Iterator[np.ndarray]:
    import numpy as np

    if Path(path).suffix == ".npy":
        if not Path(path).is_file():
            raise InvalidArgumentError(f"There is no file {str(path)!r} to read tokens from.")
        ids = np.load(path, mmap_mode="r")
        if not np.issubdtype(ids.dtype, np.integer):
            raise InvalidArgumentError(f"{str(path)!r} holds {ids.dtype}: tokens are whole numbers.")
        yield np.asarray(ids).reshape(-1).astype(np.int64)
        return
    for text in read_texts(path):
        yield np.asarray([*tokenizer.encode(text), *([] if end is None else [end])], np.int64)


def _paths(sources: Source | Iterable[Source]) -> list[Source]:
    if isinstance(sources, (str, os.PathLike)):
        return [sources]
    paths = list(sources)
    if not paths:
        raise InvalidArgumentError("sources is empty: name at least one file or folder with text.")
    return paths


def _name(paths: list[Source]) -> str:
    return repr(str(paths[0])) if len(paths) == 1 else f"{len(paths)} sources"
