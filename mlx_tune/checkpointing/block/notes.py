"""Notes of what containers held, without holding on to the arrays in them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.places import Held


class Ref:
    """Stands for an array in a note of what a container held."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Remade:
    """Stands for a tuple or frozen set that holds arrays, which has to be made anew to hold others."""

    __slots__ = ("attributes", "items", "kind")

    def __init__(self, kind: type, items: list[Any], attributes: dict[str, Any] | None) -> None:
        self.kind = kind
        self.items = items
        self.attributes = attributes


def filled(template: Any, arrays: list[mx.array]) -> Any:
    """A value with the arrays that its template stands for."""
    if type(template) is Ref:
        return arrays[template.index]
    if type(template) is Remade:
        items = [filled(item, arrays) for item in template.items]
        # Past any constructor of a subclass, which may ask for something else.
        base: Any = tuple if issubclass(template.kind, tuple) else frozenset
        made = base.__new__(template.kind, items)
        if template.attributes:
            vars(made).update(template.attributes)
        return made
    return template


class Note:
    """The contents of one place.

    Attributes:
        place: Where.
        items: The contents.
        marks: For the keys of `items` whose values are or hold arrays, what stands for them.
    """

    __slots__ = ("items", "marks", "place")

    def __init__(self, place: Held) -> None:
        self.place = place
        self.items: Any = place.get()
        self.marks: dict[Any, Any] = {}

    def filled(self, arrays: list[mx.array]) -> Any:
        """The items with these arrays in them."""
        if not self.marks:
            return self.items
        items = self.items.copy()
        for key, template in self.marks.items():
            items[key] = filled(template, arrays)
        return items

    def forget(self) -> None:
        """Let go of the arrays; what stands for them is enough."""
        for key in self.marks:
            self.items[key] = None


def untrained(notes: list[Note]) -> set[int]:
    """The indices of arrays that modules hold and do not train: frozen ones, and those named with an underscore."""
    trained: set[int] = set()
    found: set[int] = set()
    for note in notes:
        if isinstance(note.place.held, nn.Module):
            frozen = vars(note.place.held).get("_no_grad", ())
            for key, mark in note.marks.items():
                if type(mark) is Ref:
                    (found if key in frozen or str(key).startswith("_") else trained).add(mark.index)
    return found - trained
