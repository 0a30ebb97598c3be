"""Garbage collections that take no time: quick where each trial step needs one, and none while much is built."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_collections() -> Iterator[None]:
    """Let collections inside the block look only at what was made inside it.

    A step's peak must not contain arrays that an earlier step left in reference cycles, so garbage is collected before
    each. With a framework or two imported that takes a tenth of a second, over and over for the same objects.

    Where the program has frozen its objects itself, as those that fork do, this does nothing: they could not be told
    from others afterwards.
    """
    if _frozen_by_program():
        yield
        return
    gc.collect()
    try:
        gc.freeze()
        yield
    finally:
        gc.unfreeze()


@contextmanager
def no_collections() -> Iterator[None]:
    """Let no collection start by itself inside the block.

    Each hundred thousand objects that are built and kept make Python look at all that there are, to find no garbage.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def is_frozen(thing: object) -> bool:
    """True where `gc.freeze` has put an object, which collections would look at, out of their sight.

    Args:
        thing: An object that the garbage collector tracks.
    """
    # Most programs freeze nothing, and a list of all objects takes some hundredths of a second.
    return gc.get_freeze_count() > 0 and not any(other is thing for other in gc.get_objects())


def _frozen_by_program() -> bool:
    """True where the program froze its objects.

    Since Python 3.12 a collection freezes the objects that live for ever, a few hundred, and does so again after they
    were thawed. A program freezes everything that there is, also the oldest module that is not the interpreter's.
    """
    return is_frozen(vars(os))
