"""The weights of a model that is being quantized, in their files from the start, and a journal of what is done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.files.durable_lines import append_line, read_objects
from mlx_tune.files.scratch import writing
from mlx_tune.files.tensor_file import TensorFile
from mlx_tune.quantization.build_report import LayerOutcome

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_tune.quantization.in_pieces import Energies

_FORMAT = 1
_WAY_OUT = "Make room on that disk, and the same call goes on; or name a destination on a larger one."


class FolderStore:
    """Shards of safetensors that are filled layer by layer, and what a later call needs to go on.

    Args:
        work: The folder for all of it. The shards are in `model` below it.
        shards: The arrays of each file, by the file's name. Nothing is evaluated.
        task: Everything that decides on the outcome, ready for JSON.

    Attributes:
        folder: The folder with the shards.

    Raises:
        InvalidArgumentError: An earlier call, for another task, left its work here.
        DiskError: The disk has too little room for the shards.
    """

    def __init__(self, work: Path, shards: Mapping[str, Mapping[str, mx.array]], task: Mapping[str, object]) -> None:
        """Look what an earlier call has left."""
        self.folder = work / "model"
        self._journal, self._energies_file = work / "journal.jsonl", work / "energies.safetensors"
        self._files = [TensorFile(self.folder / name, arrays) for name, arrays in shards.items()]
        pairs = zip(self._files, shards.values(), strict=True)
        self._file_of = {name: file for file, arrays in pairs for name in arrays}
        self._touched = set[TensorFile]()
        self.outcomes: dict[str, LayerOutcome] = {}
        self.energies: Energies | None = None
        layout = [[file.path.name, file.header] for file in self._files]
        digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
        self._begin = {"mlx_tune_quantize_folder": _FORMAT, **task, "layout": digest}
        self._read()

    def write(self, name: str, array: mx.array) -> None:
        """Write an array to its place."""
        file = self._file_of[name]
        with writing(self.folder.parents[1], "The quantized model", way_out=_WAY_OUT):
            file.write(name, array)
        self._touched.add(file)

    def read(self, name: str) -> mx.array:
        """An array that was written, read when it is evaluated."""
        import mlx.core as mx

        loaded: Any = mx.load(str(self._file_of[name].path))
        array: mx.array = loaded[name]
        return array

    def finish(self, outcome: LayerOutcome) -> None:
        """Note that a layer is done, once the disk has its arrays."""
        self.flush()
        self._note({"layer": asdict(outcome)})
        self.outcomes[outcome.path] = outcome

    def remember(self, energies: Energies) -> None:
        """Keep the energies of inputs, which took running the model."""
        import mlx.core as mx

        arrays, notes = energies
        if arrays:
            with writing(self.folder, "The journal", way_out=_WAY_OUT):
                mx.save_safetensors(str(self._energies_file), dict(arrays))
                with self._energies_file.open("rb") as file:
                    os.fsync(file.fileno())
        self._note({"notes": list(notes), "energies": bool(arrays)})
        self.energies = energies

    def flush(self) -> None:
        """Wait until the disk has all that was written."""
        for file in self._touched:
            file.flush()
        self._touched.clear()

    def __enter__(self) -> Self:
        """Make the files, or open those of the earlier call."""
        missing = sum(file.missing_bytes for file in self._files)
        with writing(self.folder.parents[1], "The quantized model", needed_bytes=missing, way_out=_WAY_OUT):
            self.folder.mkdir(exist_ok=True)
            for file in self._files:
                file.open()
        if not self._journal.exists() or not self._journal.stat().st_size:
            self._note(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _note(self, record: Mapping[str, object]) -> None:
        append_line(self._journal, json.dumps(record) + "\n", "The journal", _WAY_OUT)

    def _read(self) -> None:
        import mlx.core as mx

        begin, *records = self._records() or [self._begin]
        changed = [key for key in self._begin if begin.get(key) != self._begin[key]]
        if changed:
            key = changed[0]
            raise self._refusal(
                f"holds what an earlier call made for another task: {key} was {begin.get(key)}, now it is "
                f"{self._begin[key]}"
            )
        for record in records:
            if "layer" in record:
                outcome = LayerOutcome(**record["layer"])
                self.outcomes[outcome.path] = outcome
            else:
                arrays: Any = mx.load(str(self._energies_file)) if record["energies"] else {}
                self.energies = arrays, tuple(record["notes"])
        if self.outcomes and not all(file.is_whole for file in self._files):
            raise self._refusal("lacks files that its journal tells of")

    def _records(self) -> list[dict[str, Any]]:
        try:
            return read_objects(self._journal)
        except ValueError as error:
            raise self._refusal(f"has a journal that cannot be read ({error})") from None

    def _refusal(self, why: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"{str(self._journal.parent)!r} {why}. Delete that folder to begin anew, give the arguments of the earlier "
            "call to go on from it, or name another destination."
        )
