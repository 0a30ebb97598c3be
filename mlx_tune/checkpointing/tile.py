"""Tiles: modules that work on each position alone, run a few positions at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_tune.checkpointing.block.classes import Wrapping
from mlx_tune.checkpointing.block.constants import Refusals
from mlx_tune.checkpointing.block.pieces import call_tiled
from mlx_tune.checkpointing.block.wrap import checkpoint, is_checkpointed, kept_names, require_initialized, unwrap
from mlx_tune.checkpointing.blocks import Select, find_blocks
from mlx_tune.checkpointing.positions import UntriedError, mixing
from mlx_tune.errors import CheckpointError, InvalidArgumentError
from mlx_tune.graphs.arguments import argument_arrays, with_arrays
from mlx_tune.graphs.tracing.recomputation import is_tracing
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.substitution import Substitute, plain_class
from mlx_tune.units import whole_number

M = TypeVar("M", bound=nn.Module)
Args = tuple[object, ...]
Kwargs = dict[str, object]

_TOKENS = "_tile_tokens"  # the attribute of a tiled module that holds the most positions of a piece
_REFUSALS = "_tile_refusals"
_TRIED = "_tile_tried"  # false until it was tried out that it works on each position alone
_MARK = "_tile_trace"  # as the mark of a checkpoint: compiled steps are traced anew


def tile(module: M, tokens: int = 1024) -> M:
    """Run a module that works on each position alone piece by piece, so that long rows need little memory.

    An MLP widens what it is given several times over, and holds that for all positions at once. In pieces there is one
    piece's worth at a time, forward and backward: each piece waits for the one before, and is computed again for its
    gradient, as in a checkpoint. Inside a checkpointed block that costs no time, as the block's own second run leaves
    the pieces out. The gradient of what it is given waits for those of its weights, as a checkpointed block's does.
    Values are those of the plain module, gradients those up to the order of a sum. Random draws are made piece by
    piece, and repeated.

    The first array among the arguments, `[..., length, width]`, is cut along its length, with every other that begins
    with `[..., length]`, such as the choice of experts; what remains is handed on whole.

    Args:
        module: An MLP, a norm, experts; tiled in place and this instance only, with the same parameter names. Tiling it
            again sets `tokens`.
        tokens: The most positions in a piece, those of all rows together.

    Returns:
        The module itself. `untile` undoes it.

    Raises:
        InvalidArgumentError: `tokens` is no positive whole number, or `module` no module.
        CheckpointError: The module does not work on each position alone, as a trial on five positions shows; it is
            checkpointed itself; its class cannot be subclassed, or never calls `super().__init__()`.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> x = mx.random.normal((1, 100, 8))
        >>> before = mlp(x)
        >>> mx.allclose(mt.tile(mlp, tokens=16)(x), before, atol=1e-5).item()
        True
    """
    size = whole_number(tokens, "tokens", least=1)
    if not isinstance(module, nn.Module):
        raise InvalidArgumentError(f"tile() takes an nn.Module, and was given {type(module).__name__}.")
    require_initialized([("", module)])
    if not isinstance(module, _Tiled):
        if is_checkpointed(module):
            raise CheckpointError(
                f"{type(module).__name__} is checkpointed. A tile computes its pieces again by itself: call "
                "uncheckpoint() on it first, or tile what is inside it."
            )
        reason = _reason_not_to(module)
        if reason:
            raise _refused(module, reason)
        _put_on(module, tried=reason is None)
    _set_tokens(module, size)
    return module


def untile(model: nn.Module) -> int:
    """Undo `tile` for a module and every module below it.

    Args:
        model: A module.

    Returns:
        How many were undone.

    Raises:
        InvalidArgumentError: `model` is no module.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> mlp = mt.tile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> mt.untile(mlp), type(mlp) is nn.Sequential
        (1, True)
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"untile() takes an nn.Module, and was given {type(model).__name__}.")
    return sum(_untile_one(module) for module in model.modules())


def is_tiled(module: object) -> bool:
    """Tell whether a module is tiled itself. Modules below it do not count.

    Args:
        module: Anything.

    Returns:
        True for what `tile` returned, until it is undone.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> mt.is_tiled(nn.Linear(2, 2)), mt.is_tiled(mt.tile(nn.Linear(2, 2)))
        (False, True)
    """
    return isinstance(module, _Tiled)


@dataclass(frozen=True)
class TileHandle(Tabular):
    """Which modules one call of `tile_blocks` tiled, and the way back.

    Attributes:
        paths: The modules' paths in the model, in order.
        tokens: The most positions in a piece.
        passed_over: Modules that were looked at and left as they are, with the reason.
    """

    paths: tuple[str, ...]
    tokens: int
    passed_over: dict[str, str]
    _tiled: list[nn.Module] = field(repr=False, compare=False)

    def undo(self) -> int:
        """Undo what this handle's call did, and nothing that was tiled before it.

        Returns:
            How many modules were undone; 0 the second time.
        """
        undone = sum(map(_untile_one, self._tiled))
        self._tiled.clear()
        return undone

    def __enter__(self) -> TileHandle:
        """The modules are tiled already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo."""
        self.undo()

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return {"paths": list(self.paths), "tokens": self.tokens, "passed_over": dict(self.passed_over)}

    def table(self) -> Table:
        """A table of the modules."""
        rows = [(path, "tiled", "") for path in self.paths]
        rows += [(path, "as it was", reason) for path, reason in self.passed_over.items()]
        return Table(["module", "is", "because"], rows, title=f"{len(self.paths)} modules in pieces of {self.tokens}")


def tile_blocks(model: nn.Module, tokens: int = 1024, select: Select | None = None) -> TileHandle:
    """Tile the MLPs and experts of a model's repeated blocks, in place.

    Args:
        model: The model.
        tokens: As for `tile`.
        select: Which modules, instead of those found: a pattern on the path such as `"model.layers.*.mlp"`, or a
            function of path and module. By default, of the modules right inside each block that
            `checkpoint_blocks` finds, those that have modules of their own and, where one of each kind is tried, work
            on each position alone: the MLP and not attention.

    Returns:
        A handle: `.paths`, `.passed_over`, `.undo()`, a context manager that undoes, a table as `str`.

    Raises:
        CheckpointError: None was found, or one that was selected does not work on each position alone.
        InvalidArgumentError: `tokens` is no positive whole number, `model` no module.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attention = nn.MultiHeadAttention(8, 2)
        ...         self.mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        ...     def __call__(self, x):
        ...         return x + self.mlp(x + self.attention(x, x, x))
        >>> with mt.tile_blocks(nn.Sequential(Block(), Block()), tokens=64) as handle:
        ...     print(*handle.paths)
        layers.0.mlp layers.1.mlp
    """
    size = whole_number(tokens, "tokens", least=1)
    stacks = find_blocks(model, select)
    found: dict[str, nn.Module] = {}
    passed_over: dict[str, str] = {}
    if select is not None:
        found = dict(module for stack in stacks for module in stack)
    else:
        reasons: dict[object, str | None] = {}
        for path, module in _inside(block for stack in stacks for block in stack):
            kind = _kind(module)
            if kind not in reasons:
                reasons[kind] = None if is_tiled(module) else _reason_not_to(module)
            reason = reasons[kind]
            if reason is None:
                found[path] = module
            else:
                passed_over[path] = reason or "it takes something else than one array [batch, length, width]"
        if not found:
            looked = "; ".join(f"{path}: {reason}" for path, reason in list(passed_over.items())[:6]) or "none at all"
            raise CheckpointError(
                f"{type(model).__name__} has no module in its blocks that is known to work on each position alone. "
                f"Looked at modules with modules of their own: {looked}. Name some with select=, or call "
                "mlx_tune.tile(module)."
            )
    handle = TileHandle(tuple(found), size, passed_over, [])
    try:
        for path, module in found.items():
            if is_tiled(module):
                continue
            if select is None:
                _put_on(module, tried=True)
                _set_tokens(module, size)
            else:
                _tile_at(path, module, size)
            handle._tiled.append(module)
    except BaseException:
        handle.undo()
        raise
    return handle


class _Tiled(Substitute):
    """Marks the subclasses made here, and comes first in them."""

    __slots__ = ()


def _call(body: Callable[..., object], module: nn.Module, args: Args, kwargs: Kwargs) -> object:
    if not getattr(module, _TRIED):
        _try_call(body, module, args, kwargs)
    refusals = getattr(module, _REFUSALS)
    return call_tiled(body, module, args, kwargs, getattr(module, _TOKENS), refusals)


def _new_tiled(plain: type, *args: object) -> object:
    return _wrapping.new(plain, *args)


_wrapping = Wrapping(_Tiled, _call, "tiled", _new_tiled)


def _put_on(module: nn.Module, *, tried: bool) -> None:
    _wrapping.put_on(module)
    object.__setattr__(module, _REFUSALS, Refusals())
    object.__setattr__(module, _TRIED, tried)


def _set_tokens(module: nn.Module, tokens: int) -> None:
    object.__setattr__(module, _TOKENS, tokens)
    module[_MARK] = mx.zeros((0, tokens), mx.bool_)


def _tile_at(path: str, module: nn.Module, tokens: int) -> None:
    try:
        tile(module, tokens)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _untile_one(module: nn.Module) -> bool:
    if not isinstance(module, _Tiled):
        return False
    # A tiled module that was checkpointed later has the checkpoint outside.
    outside = kept_names(module) if is_checkpointed(module) else None
    if outside is not None:
        unwrap(module)
    undone = _wrapping.take_off(module, _TOKENS, _REFUSALS, _TRIED, _MARK)
    if outside is not None:
        checkpoint(module, keep=outside)
    return undone


def _inside(blocks: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """The modules right inside blocks that have modules of their own, with their paths."""
    for path, block in blocks:
        for name, child in block.children().items():
            if isinstance(child, nn.Module) and len(child.modules()) > 1:
                yield f"{path}.{name}", child


def _kind(module: nn.Module) -> object:
    """Equal for modules of one class, with parts and parameters that are alike."""
    parameters = dict(tree_flatten(module.parameters())).items()
    classes = tuple(plain_class(type(part)) for part in module.modules())
    return classes, tuple((name, array.shape, array.dtype) for name, array in parameters)


def _reason_not_to(module: nn.Module) -> str | None:
    """A sentence on why a module cannot be tiled; an empty one where it cannot be tried out without a call."""
    try:
        return mixing(module, lambda few: module(few[0]))
    except UntriedError:
        return ""


def _try_call(body: Callable[..., object], module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Try a module out on arrays like those of its first call."""
    given = argument_arrays((args, kwargs))
    if is_tracing() or not given or given[0].ndim < 2:
        return
    axes = given[0].shape[:-1]
    cut = [array.shape[: len(axes)] == axes for array in given]

    def on_few(few: list[mx.array]) -> object:
        left = iter(few)
        few_args, few_kwargs = with_arrays(
            (args, kwargs), (next(left) if yes else array for array, yes in zip(given, cut, strict=True))
        )
        return body(*few_args, **few_kwargs)

    like = [array for array, yes in zip(given, cut, strict=True) if yes]
    try:
        reason = mixing(module, on_few, len(axes), like)
    except UntriedError as error:
        warnings.warn(
            f"{type(module).__name__} is tiled, and it could not be tried out that it works on each position alone "
            f"({error}). Results are wrong where it does not: compare once with the plain module.",
            stacklevel=4,
        )
        reason = None
    if reason:
        raise _refused(module, reason)
    object.__setattr__(module, _TRIED, True)


def _refused(module: nn.Module, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{type(module).__name__} cannot be tiled: {reason}. Tile modules that work on each position alone, such as "
        "an MLP, a norm or experts; attention, convolutions and norms over a batch do not."
    )
