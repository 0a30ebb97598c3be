"""Notes of what containers held, without holding on to the arrays in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_tune.reach.places import Held

#: The place of a value, link by link from the value up: that of its holder, how the holder writes a key, and the key.
Path = tuple[object, str, object]


class Ref:
    """Stands for an array in a note of what a container held."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Remade:
    """Stands for a tuple or frozen set that holds arrays, which has to be made anew to hold others."""

    __slots__ = ("attributes", "items", "kind")

    def __init__(self, kind: type, items: list[object], attributes: dict[str, object] | None) -> None:
        self.kind = kind
        self.items = items
        self.attributes = attributes


def fill(template: object, arrays: list[mx.array]) -> Any:
    """A value with the arrays that its template stands for."""
    if type(template) is Ref:
        return arrays[template.index]
    if type(template) is Remade:
        items = [fill(item, arrays) for item in template.items]
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
        path: The way by which it was found.
        form: The way in which its keys are written: `[{!r}]` for items, `.{}` for attributes.
        home: The module of the class or function through which it was found.
    """

    __slots__ = ("form", "home", "items", "marks", "path", "place")

    def __init__(self, place: Held, path: Path | None, form: str, home: str | None) -> None:
        self.place = place
        self.path = path
        self.form = form
        self.home = home
        self.items: Any = place.get()
        self.marks: dict[object, object] = {}

    def filled(self, arrays: list[mx.array]) -> Any:
        """The items with these arrays in them."""
        if not self.marks:
            return self.items
        items = self.items.copy()
        for key, template in self.marks.items():
            items[key] = fill(template, arrays)
        return items

    def forget(self) -> None:
        """Let go of the arrays; what stands for them is enough."""
        for key in self.marks:
            self.items[key] = None


def written(path: Path | None) -> str:
    """Where something is, as one would write it."""
    parts: list[str] = []
    step: Any = path
    while step is not None:
        step, form, key = step
        parts.append(form.format(key))
    return "".join(reversed(parts))
