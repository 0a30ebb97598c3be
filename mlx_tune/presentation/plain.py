"""Results as programs see them: plain values, ready for JSON."""

from __future__ import annotations

#: What `json.dumps` writes, in any nesting; a tuple as a list.
Json = None | bool | int | float | str | list["Json"] | tuple["Json", ...] | dict[str, "Json"]
