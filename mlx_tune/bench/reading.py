"""A report out of its JSON file, held to the schema: every key there, none besides, each of its type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from mlx_tune.bench.report import SCHEMA, SIZES, BenchMachine, BenchReport, Row, SectionResult
from mlx_tune.errors import InvalidArgumentError

#: A key's types, or the objects in its list.
_Shape: TypeAlias = "Mapping[str, tuple[type, ...] | Mapping[str, Any] | list[Any]]"

_NONE = type(None)
_ROW: _Shape = {"claim": (str,), "text": (str,), "page": (str,), "measured": (str,), "holds": (bool, _NONE)}
_SECTION: _Shape = {
    "name": (str,),
    "size": (str, _NONE),
    "status": (str,),
    "reason": (str,),
    "seconds": (float, int, _NONE),
    "peak_bytes": (int, _NONE),
    "rows": [_ROW],
    "figures": (dict, _NONE),
}
_MACHINE: _Shape = {
    "backend": (str,),
    "name": (str,),
    "architecture": (str, _NONE),
    "memory_bytes": (int, _NONE),
    "working_set_bytes": (int, _NONE),
    "system": (str, _NONE),
}
#: The whole file.
REPORT: _Shape = {
    "schema": (int,),
    "day": (str, _NONE),
    "source": (str,),
    "interrupted": (bool,),
    "machine": _MACHINE,
    "versions": (dict,),
    "sections": [_SECTION],
}


def read_report(text: str, name: str = "the file") -> BenchReport:
    """The report in a text, held to the schema.

    Args:
        text: JSON, as `mlx-tune bench --out` writes it.
        name: Its name in errors.

    Returns:
        The report.

    Raises:
        InvalidArgumentError: It is no report of this version of the schema; the text names the key.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{name} is no JSON: {error}.") from None
    version = found.get("schema") if isinstance(found, dict) else None
    if version != SCHEMA:
        raise InvalidArgumentError(f"{name} has schema {version!r}, and this version reads {SCHEMA}.")
    _hold(found, REPORT, name)
    sections = []
    for section in found.pop("sections"):
        if section["status"] not in ("measured", "left out", "broke") or section["size"] not in (*SIZES, None):
            raise InvalidArgumentError(
                f"{name}: section {section['name']!r} has status {section['status']!r} and size {section['size']!r}."
            )
        rows = tuple(Row(**row) for row in section.pop("rows"))
        sections.append(SectionResult(**section, rows=rows))
    machine = BenchMachine(**found.pop("machine"))
    del found["schema"]
    return BenchReport(**found, machine=machine, sections=tuple(sections))


def _hold(value: object, shape: Any, where: str) -> None:
    """Compare a value with a shape.

    Raises:
        InvalidArgumentError: They differ.
    """
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise InvalidArgumentError(f"{where} is no list.")
        for i, item in enumerate(value):
            _hold(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, Mapping):
        keys = sorted(value) if isinstance(value, dict) else None
        if not isinstance(value, dict) or keys != sorted(shape):
            raise InvalidArgumentError(f"{where} has the keys {keys}, and the schema has {sorted(shape)}.")
        for key, inner in shape.items():
            _hold(value[key], inner, f"{where}.{key}")
    elif not isinstance(value, shape) or (isinstance(value, bool) and bool not in shape):
        wanted = " or ".join("null" if kind is _NONE else kind.__name__ for kind in shape)
        raise InvalidArgumentError(f"{where} is {value!r}, and the schema has {wanted}.")
