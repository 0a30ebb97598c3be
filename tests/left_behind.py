"""Functions that leave an array somewhere in the code around them: one table for tracing and for checkpointing.

Each case makes a function of `x` that leaves `x.sum()`, and one that gives what is there.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import threading
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import mlx.core as mx

Case = tuple[Callable[[mx.array], mx.array], Callable[[], Any]]

KIT = types.ModuleType("kit_of_a_user")
exec(
    "LOG = []\nLAST = None\ndef note(y):\n    LOG.append(y)\n    return y\n"
    "def keep(y):\n    global LAST\n    LAST = y\n    return y\n",
    KIT.__dict__,
)
PACKAGE = types.ModuleType("package_of_kits")
PACKAGE.kit = KIT  # type: ignore[attr-defined]
sys.modules["kit_of_a_user"], sys.modules["package_of_kits"] = KIT, PACKAGE

INSTALLED = types.ModuleType("package_that_is_installed")
INSTALLED.__file__ = "/somewhere/site-packages/package_that_is_installed/__init__.py"
exec(
    "LINES = []\ndef remember(y):\n    LINES.append(y)\n"
    "class Journal:\n    def __init__(self):\n        self.lines = []\n"
    "    def add(self, y):\n        self.lines.append(y)\n",
    INSTALLED.__dict__,
)
sys.modules["package_that_is_installed"] = INSTALLED

note = KIT.note  # as `from kit_of_a_user import note` gives it
LOG: list[mx.array] = []
LAST: Any = None
SLOT: ContextVar[Any] = ContextVar("SLOT", default=None)
THREAD = threading.local()
CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Put a case into the table."""
    CASES[make.__name__.replace("_", " ")] = make
    return make


@dataclasses.dataclass
class Record:
    last: Any = None


class Noting:
    seen: list[mx.array] = []
    last: Any = None

    @staticmethod
    def aside(y: mx.array) -> None:
        LOG.append(y)

    @classmethod
    def put(cls, y: mx.array) -> None:
        cls.last = y

    @classmethod
    def put_anew(cls, y: mx.array) -> None:
        cls.newest = y  # type: ignore[attr-defined]

    @property
    def log(self) -> list[mx.array]:
        return LOG

    def on_itself(self, x: mx.array) -> mx.array:
        self.own = x.sum()
        return self.own

    def __call__(self, x: mx.array) -> mx.array:
        self.aside(x.sum())
        return x.sum()


def step_of(leave: Callable[[mx.array], Any]) -> Callable[[mx.array], mx.array]:
    """A function that leaves its result by a function that it closes over."""

    def step(x: mx.array) -> mx.array:
        y = x.sum()
        leave(y)
        return y

    return step


@case
def a_global_list() -> Case:
    def step(x: mx.array) -> mx.array:
        LOG.append(x.sum())
        return LOG[-1]

    return step, lambda: LOG


@case
def a_global_name() -> Case:
    def step(x: mx.array) -> mx.array:
        global LAST
        LAST = x.sum()
        return LAST

    return step, lambda: LAST


@case
def a_list_of_a_module() -> Case:
    def step(x: mx.array) -> mx.array:
        KIT.LOG.append(x.sum())
        return x.sum()

    return step, lambda: KIT.LOG


@case
def a_function_of_a_module() -> Case:
    def step(x: mx.array) -> mx.array:
        return KIT.note(x.sum())

    return step, lambda: KIT.LOG


@case
def a_module_in_a_module() -> Case:
    def step(x: mx.array) -> mx.array:
        return PACKAGE.kit.note(x.sum())

    return step, lambda: KIT.LOG


@case
def a_name_of_a_module() -> Case:
    def step(x: mx.array) -> mx.array:
        KIT.LAST = x.sum()
        return KIT.LAST

    return step, lambda: KIT.LAST


@case
def a_new_name_of_a_module_in_a_module() -> Case:
    def step(x: mx.array) -> mx.array:
        PACKAGE.kit.NEWEST = x.sum()
        return x.sum()

    return step, lambda: vars(KIT).get("NEWEST")


@case
def a_global_of_a_module() -> Case:
    def step(x: mx.array) -> mx.array:
        return KIT.keep(x.sum())

    return step, lambda: KIT.LAST


@case
def a_function_taken_from_a_module() -> Case:
    def step(x: mx.array) -> mx.array:
        return note(x.sum())

    return step, lambda: KIT.LOG


@case
def a_module_imported_inside() -> Case:
    def step(x: mx.array) -> mx.array:
        import kit_of_a_user as inner

        return inner.note(x.sum())

    return step, lambda: KIT.LOG


@case
def a_function_imported_inside() -> Case:
    def step(x: mx.array) -> mx.array:
        from package_of_kits.kit import note as leave  # type: ignore[import-not-found]

        return leave(x.sum())

    sys.modules["package_of_kits.kit"] = KIT
    return step, lambda: KIT.LOG


@case
def a_module_imported_for_a_function_inside() -> Case:
    def step(x: mx.array) -> mx.array:
        import kit_of_a_user

        def inside(y: mx.array) -> mx.array:
            return kit_of_a_user.note(y)

        return inside(x.sum())

    return step, lambda: KIT.LOG


@case
def a_module_closed_over() -> Case:
    kit = KIT

    def step(x: mx.array) -> mx.array:
        return kit.note(x.sum())

    return step, lambda: KIT.LOG


@case
def a_class_attribute() -> Case:
    def step(x: mx.array) -> mx.array:
        Noting.last = x.sum()
        return Noting.last

    return step, lambda: Noting.last


@case
def a_list_of_a_class() -> Case:
    def step(x: mx.array) -> mx.array:
        Noting.seen.append(x.sum())
        return x.sum()

    return step, lambda: Noting.seen


@case
def a_class_method() -> Case:
    return step_of(Noting.put), lambda: Noting.last


@case
def a_class_method_that_makes_an_attribute() -> Case:
    return step_of(Noting.put_anew), lambda: vars(Noting).get("newest")


@case
def a_static_method_that_is_called() -> Case:
    return Noting().__call__, lambda: LOG


@case
def a_property() -> Case:
    noting = Noting()

    def step(x: mx.array) -> mx.array:
        noting.log.append(x.sum())
        return x.sum()

    return step, lambda: LOG


@case
def a_bound_method() -> Case:
    noting = Noting()
    return noting.on_itself, lambda: vars(noting).get("own")


@case
def a_callable_object() -> Case:
    return Noting(), lambda: LOG


@case
def a_partial() -> Case:
    held: list[mx.array] = []

    def leave(where: list[mx.array], y: mx.array) -> None:
        where.append(y)

    return step_of(partial(leave, held)), lambda: held


@case
def a_default() -> Case:
    def step(x: mx.array, held: list[mx.array] = []) -> mx.array:  # noqa: B006
        held.append(x.sum())
        return x.sum()

    return step, lambda: step.__defaults__


@case
def a_keyword_default() -> Case:
    def step(x: mx.array, *, held: list[mx.array] = []) -> mx.array:  # noqa: B006
        held.append(x.sum())
        return x.sum()

    return step, lambda: step.__kwdefaults__


@case
def a_variable_closed_over() -> Case:
    last: Any = None

    def step(x: mx.array) -> mx.array:
        nonlocal last
        last = x.sum()
        return last

    return step, lambda: last


@case
def a_dictionary() -> Case:
    held: dict[str, Any] = {}
    return step_of(lambda y: held.update(y=y)), lambda: held


@case
def a_deque() -> Case:
    held: collections.deque[mx.array] = collections.deque(maxlen=2)
    return step_of(held.append), lambda: list(held)


@case
def a_user_dictionary() -> Case:
    held: collections.UserDict[str, Any] = collections.UserDict()
    return step_of(lambda y: held.update(y=y)), lambda: dict(held)


@case
def a_data_class() -> Case:
    record = Record()
    return step_of(lambda y: setattr(record, "last", y)), lambda: record.last


@case
def a_namespace() -> Case:
    held = types.SimpleNamespace()
    return step_of(lambda y: setattr(held, "last", y)), lambda: vars(held)


@case
def a_context_variable() -> Case:
    SLOT.set(None)
    return step_of(SLOT.set), SLOT.get


@case
def what_a_thread_holds() -> Case:
    return step_of(lambda y: setattr(THREAD, "last", y)), lambda: dict(vars(THREAD))


@case
def behind_a_weak_reference() -> Case:
    record = Record()
    reference = weakref.ref(record)
    return step_of(lambda y: setattr(reference(), "last", y)), lambda: record.last


@case
def in_a_cycle() -> Case:
    first: dict[str, Any] = {}
    first["second"] = second = {"first": first, "log": list[mx.array]()}
    return step_of(second["log"].append), lambda: second["log"]  # type: ignore[attr-defined]


class Holder:
    def __init__(self, kit: Any, *kits: Any) -> None:
        self.kit, self.kits, self.by_name = kit, kits, {"kit": kit}

    def noting(self, x: mx.array) -> mx.array:
        return self.kit.note(x.sum())

    def noting_by_another_name(self, x: mx.array) -> mx.array:
        kit = self.by_name["kit"]
        return kit.note(x.sum())

    def noting_below(self, x: mx.array) -> mx.array:
        return self.kits[0].kit.note(x.sum())

    def placing(self, x: mx.array) -> mx.array:
        self.kit.LAST = x.sum()
        return self.kit.LAST

    def placing_anew(self, x: mx.array) -> mx.array:
        self.kit.NEWEST = x.sum()
        return x.sum()

    def placing_in_a_class(self, x: mx.array) -> mx.array:
        self.kit.last = x.sum()
        return x.sum()


class Slotted:
    __slots__ = ("__hidden", "last")

    def __init__(self) -> None:
        self.last = self.__hidden = None

    def hide(self, y: mx.array) -> None:
        self.__hidden = y  # type: ignore[assignment]

    def hidden(self) -> Any:
        return self.__hidden


def ask(kit: Any, y: mx.array) -> Any:
    return kit.note(y)


def leaves_on_itself(x: mx.array) -> mx.array:
    leaves_on_itself.last = x.sum()  # type: ignore[attr-defined]
    return x.sum()


@case
def a_module_in_an_attribute() -> Case:
    return Holder(KIT).noting, lambda: KIT.LOG


@case
def a_module_in_an_item() -> Case:
    return Holder(KIT).noting_by_another_name, lambda: KIT.LOG


@case
def a_module_in_a_module_in_a_tuple() -> Case:
    return Holder(None, PACKAGE).noting_below, lambda: KIT.LOG


@case
def a_name_of_a_module_in_an_attribute() -> Case:
    return Holder(KIT).placing, lambda: KIT.LAST


@case
def a_new_name_of_a_module_in_an_attribute() -> Case:
    return Holder(KIT).placing_anew, lambda: vars(KIT).get("NEWEST")


@case
def a_module_handed_to_a_function() -> Case:
    def step(x: mx.array) -> mx.array:
        return ask(KIT, x.sum())

    return step, lambda: KIT.LOG


@case
def a_module_in_a_partial() -> Case:
    return step_of(partial(ask, KIT)), lambda: KIT.LOG


@case
def a_module_in_a_default() -> Case:
    def step(x: mx.array, kit: Any = KIT) -> mx.array:
        return kit.note(x.sum())

    return step, lambda: KIT.LOG


@case
def a_class_in_an_attribute() -> Case:
    return Holder(Noting).placing_in_a_class, lambda: Noting.last


@case
def an_attribute_of_the_function() -> Case:
    vars(leaves_on_itself).clear()
    return leaves_on_itself, lambda: vars(leaves_on_itself).get("last")


@case
def an_attribute_of_a_function_closed_over() -> Case:
    def step(x: mx.array) -> mx.array:
        step.last = x.sum()  # type: ignore[attr-defined]
        return x.sum()

    return step, lambda: vars(step).get("last")


@case
def a_slot() -> Case:
    slotted = Slotted()
    return step_of(lambda y: setattr(slotted, "last", y)), lambda: slotted.last


@case
def a_private_slot() -> Case:
    slotted = Slotted()
    return step_of(slotted.hide), slotted.hidden


@case
def a_set() -> Case:
    held: set[mx.array] = set()
    return step_of(held.add), lambda: list(held)


@case
def an_ordered_dictionary() -> Case:
    held: collections.OrderedDict[str, Any] = collections.OrderedDict()
    return step_of(lambda y: held.update(y=y)), lambda: dict(held)


@case
def far_below() -> Case:
    held: dict[str, Any] = {}
    inner = held
    for _ in range(12):
        inner["in"] = inner = {}
    return step_of(lambda y: inner.update(y=y)), lambda: inner.get("y")


@case
def in_an_object_that_is_made() -> Case:
    """What is left holds the array eight objects deep."""
    held: dict[str, Any] = {}

    def leave(y: mx.array) -> None:
        for _ in range(8):
            y = types.SimpleNamespace(inner=y)  # type: ignore[assignment]
        held["y"] = y

    def found() -> Any:
        inner = held.get("y")
        while isinstance(inner, types.SimpleNamespace):
            inner = inner.inner
        return inner

    return step_of(leave), found


@case
def in_a_function_that_is_made() -> Case:
    held: dict[str, Callable[[], mx.array]] = {}

    def leave(y: mx.array) -> None:
        held["y"] = lambda: y

    return step_of(leave), lambda: held["y"]() if held else None


@case
def an_object_of_an_installed_package() -> Case:
    journal = INSTALLED.Journal()
    return step_of(journal.add), lambda: journal.lines


@case
def a_global_of_an_installed_package() -> Case:
    return step_of(lambda y: INSTALLED.remember(y)), lambda: INSTALLED.LINES


def forget() -> None:
    """Empty every place that outlives a case."""
    global LAST
    LAST = None
    LOG.clear(), KIT.LOG.clear(), INSTALLED.LINES.clear(), Noting.seen.clear()
    KIT.LAST = Noting.last = None  # type: ignore[attr-defined]
    vars(KIT).pop("NEWEST", None)
    vars(THREAD).clear()
    SLOT.set(None)
    if "newest" in vars(Noting):
        del Noting.newest  # type: ignore[attr-defined]
