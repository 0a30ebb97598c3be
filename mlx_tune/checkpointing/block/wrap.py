"""Checkpointing one block: a module in place, or a function.

A wrapped module is given a subclass of its own class: one for each class, made when it is first needed. The rest of
the module stays, so its parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast, overload
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.block.classes import Wrapping
from mlx_tune.checkpointing.block.constants import Refusals
from mlx_tune.checkpointing.block.recompute import call_checkpointed
from mlx_tune.errors import CheckpointError, InvalidArgumentError
from mlx_tune.substitution import Substitute
from mlx_tune.upstream import has_mode

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)

_NAMES = "_checkpoint_keep"  # the attribute of a wrapped block that holds the names to keep
_REFUSALS = "_checkpoint_refusals"  # the one with the inputs that have no gradient
# An empty array among the module's state, but not among its parameters. `mx.compile` keeps one trace for each set of
# input shapes and looks at nothing else: a step that was traced with the plain block would go on without the
# checkpoint for ever. With one more array among its inputs it is traced anew, and an undone block's trace comes back.
_MARK = "_checkpoint_trace"
_serials: dict[frozenset[str], int] = {}  # the array's length stands for the names to keep
_functions: WeakSet[Callable[..., object]] = WeakSet()


@overload
def checkpoint(block: M, *, keep: Iterable[str] = ()) -> M: ...
@overload
def checkpoint(block: Callable[P, R], *, keep: Iterable[str] = ()) -> Callable[P, R]: ...
def checkpoint(block: object, *, keep: Iterable[str] = ()) -> Any:
    """Trade time for memory: run a block again for its gradient instead of holding what it computed.

    Values and gradients are those of the plain block: its random draws are repeated, what it writes (running
    statistics, caches) is written once, integers, keys, strings and None may be arguments, and arrays that it takes
    from its attributes, closures, defaults, and the globals, classes and modules that it names or holds get their
    gradients.
    `mx.checkpoint` promises none of these. Arrays out of its sight (held by compiled extensions, or looked up by a
    computed name) count as constants: `verify_checkpoint` finds them.

    The gradients of a block's weights are made before the block below is run again, so that what one block computed is
    alive at a time: the gradient of each argument waits for the others that the differentiation asks for, evaluated or
    not by you. It does not wait in blocks that an enclosing checkpoint runs again, nor does the gradient of an array
    that the block takes from elsewhere than its arguments, such as a closure.

    A module in evaluation mode (`block.eval()`) is called as it is, so nothing is run twice.

    Args:
        block: An `nn.Module`, wrapped in place and this instance only, with the same parameter names; wrapping it
            again is no error and sets `keep`. Or a function.
        keep: Names of values marked with `mlx_tune.keep` inside the block, to be saved and not computed again.

    Returns:
        The module itself, or for a function a new one.

    Raises:
        InvalidArgumentError: `block` cannot be called, is a class, or `keep` is no iterable of strings.
        CheckpointError: The module's class cannot be subclassed, or never calls `super().__init__()`. On a later call:
            `keep` names what the block does not mark, the block did something else when it was run again, or an
            argument was an iterator, which can be used once.

    Reference:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> block = mt.checkpoint(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
        >>> gradient = nn.value_and_grad(block, lambda x: block(x).sum())
        >>> loss, grads = gradient(mx.ones((2, 4)))
        >>> mt.is_checkpointed(block)
        True
    """
    names = names_of(keep)
    if isinstance(block, type):
        raise InvalidArgumentError(
            f"checkpoint() wraps one module or function, and was given the class {block.__name__}. "
            f"Make an instance first, or wrap each block with mlx_tune.checkpoint_blocks(model)."
        )
    if isinstance(block, nn.Module):
        require_initialized([("", block)])
        return _wrap_module(block, names)
    if not callable(block):
        raise InvalidArgumentError(
            f"checkpoint() wraps an nn.Module or a function, and was given {type(block).__name__}."
        )
    return _wrap_function(block, names)


def uncheckpoint(model: nn.Module) -> int:
    """Undo `checkpoint` for a module and every module below it.

    Args:
        model: A module. A checkpointed function has nothing to undo: the plain one is its `__wrapped__`.

    Returns:
        How many were undone.

    Raises:
        InvalidArgumentError: `model` is no module.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> block = mt.checkpoint(nn.Linear(2, 2))
        >>> mt.uncheckpoint(block), type(block) is nn.Linear
        (1, True)
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"uncheckpoint() takes an nn.Module, and was given {type(model).__name__}. "
            "The plain form of a checkpointed function is its __wrapped__."
        )
    undone = 0
    for module in model.modules():
        undone += unwrap(module)
    return undone


def is_checkpointed(block: object) -> bool:
    """Tell whether a module or function is checkpointed itself. Blocks below it do not count.

    Args:
        block: Anything.

    Returns:
        True for what `checkpoint` returned, until it is undone.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> mt.is_checkpointed(nn.Linear(2, 2)), mt.is_checkpointed(mt.checkpoint(lambda x: x))
        (False, True)
    """
    if isinstance(block, nn.Module):
        return isinstance(block, _Checkpointed)
    # Asked of the function itself: functools.wraps copies attributes to whatever is wrapped around it.
    return isinstance(block, FunctionType) and block in _functions


def require_initialized(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse modules that MLX has not made ready: without its own attributes, some of its calls fail and others work.

    Args:
        modules: Pairs of path and module, as `named_modules` gives them.

    Raises:
        CheckpointError: The class of one never calls `super().__init__()`.
    """
    for path, module in modules:
        if not has_mode(module):
            raise CheckpointError(
                f"{type(module).__name__}{path and f' at {path!r}'} was made without nn.Module's own __init__, so it "
                f"has no training mode to ask for. Call super().__init__() first thing in its __init__."
            )


def unwrap(module: nn.Module) -> bool:
    """Make one module what it was before; false where there was nothing to undo."""
    return _wrapping.take_off(module, _NAMES, _REFUSALS, _MARK)


def kept_names(module: nn.Module) -> frozenset[str]:
    """The names that a checkpointed module saves."""
    names: frozenset[str] = vars(module).get(_NAMES, frozenset())
    return names


class _Checkpointed(Substitute):
    """Marks the subclasses made here, and comes first in them."""

    __slots__ = ()


def _wrap_module(block: M, names: frozenset[str]) -> M:
    if not isinstance(block, _Checkpointed):
        _wrapping.put_on(block)
    object.__setattr__(block, _NAMES, names)
    object.__setattr__(block, _REFUSALS, Refusals())
    block[_MARK] = mx.zeros((0, _serials.setdefault(names, len(_serials) + 1)), mx.bool_)
    return block


def _call(body: Callable[..., object], block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    if not block.training:
        return body(*args, **kwargs)
    return call_checkpointed(body, block, args, kwargs, kept_names(block), vars(block).get(_REFUSALS) or Refusals())


def _new_checkpointed(plain: type, *args: object) -> object:
    return _wrapping.new(plain, *args)


_wrapping = Wrapping(_Checkpointed, _call, "checkpointed", _new_checkpointed)


def _wrap_function(function: Callable[P, R], names: frozenset[str]) -> Callable[P, R]:
    if is_checkpointed(function):
        function = function.__wrapped__  # type: ignore[attr-defined]

    refusals = Refusals()

    @wraps(function)
    def checkpointed(*args: P.args, **kwargs: P.kwargs) -> R:
        return cast(R, call_checkpointed(function, function, args, kwargs, names, refusals))

    _functions.add(checkpointed)
    return checkpointed


def names_of(keep: Iterable[str]) -> frozenset[str]:
    """The names in `keep=`, which anybody may write as they like."""
    if isinstance(keep, str):
        raise InvalidArgumentError(f"keep= takes several names: write keep=[{keep!r}].")
    if not isinstance(keep, Iterable) or isinstance(keep, Mapping):
        raise InvalidArgumentError(
            f"keep={keep!r}: give the names that the block marks with mlx_tune.keep, such as keep=['product']."
        )
    names = list(keep)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise InvalidArgumentError(f"keep= takes names as strings, and was given {wrong[0]!r}.")
    return frozenset(names)
