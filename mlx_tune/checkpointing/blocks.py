"""Finding the repeated blocks of a model, and checkpointing them together.

A block is an element of a list, tuple or dictionary of modules that has modules of its own. Elements without any
(a Linear in a Sequential) compute too little to be worth running again. The outermost lists count: what is
repeated inside a block (experts, heads) belongs to it. Where a model has no such list, attributes next to each
other that share a class count (`self.block1`, `self.block2`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import TracebackType

import mlx.nn as nn

from mlx_tune.checkpointing.block.wrap import (
    checkpoint,
    is_checkpointed,
    kept_names,
    names_of,
    require_initialized,
    unwrap,
)
from mlx_tune.errors import CheckpointError, InvalidArgumentError
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.substitution import plain_class
from mlx_tune.units import format_names, whole_number

#: A pattern on the path (`"encoder.layers.*"`), or a function of path and module.
Select = str | Callable[[str, nn.Module], bool]
Stack = tuple[tuple[str, nn.Module], ...]


@dataclass(frozen=True)
class CheckpointHandle(Tabular):
    """Which blocks one call of `checkpoint_blocks` wrapped, and the way back.

    Attributes:
        paths: The blocks' paths in the model, in order.
        found: The number of blocks to choose from.
    """

    paths: tuple[str, ...]
    found: int
    _blocks: Stack = field(repr=False, compare=False)
    _wrapped: list[nn.Module] = field(repr=False, compare=False)
    _renamed: list[tuple[nn.Module, frozenset[str]]] = field(repr=False, compare=False)

    def undo(self) -> int:
        """Undo what this handle's call did, and nothing that was checkpointed before it.

        Blocks that were checkpointed before are left with the names to keep that they had.

        Returns:
            How many blocks were undone; 0 the second time.
        """
        undone = sum(map(unwrap, self._wrapped))
        self._wrapped.clear()
        for module, names in self._renamed:
            if is_checkpointed(module):
                checkpoint(module, keep=names)
        self._renamed.clear()
        return undone

    def __enter__(self) -> CheckpointHandle:
        """The blocks are wrapped already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo."""
        self.undo()

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return {"paths": list(self.paths), "found": self.found, "active": len(self._wrapped)}

    def table(self) -> Table:
        """A table of the blocks, as they are now."""
        rows = [
            (path, plain_class(type(module)).__name__, "yes" if is_checkpointed(module) else "no")
            for path, module in self._blocks
        ]
        active = sum(is_checkpointed(module) for _, module in self._blocks)
        return Table(["block", "class", "checkpointed"], rows, title=f"{active} of {self.found} blocks checkpointed")


def checkpoint_blocks(
    model: nn.Module, every: int = 1, select: Select | None = None, *, keep: Iterable[str] = ()
) -> CheckpointHandle:
    """Checkpoint the repeated blocks of a model, in place.

    Works on any `nn.Module`: mlx-lm models, `nn.Transformer`, nested lists, several stacks in one model. Blocks
    of different classes in one list are all found.

    Args:
        model: The model.
        every: Checkpoint the first block of each stack and every so manyth after it; 1 for all of them.
        select: Which blocks, instead of those found: a pattern on the path, with `*` and `?`
            (`"encoder.layers.*"`), or a function of path and module. Every module below the model can be selected;
            of modules inside each other the outer one is.
        keep: Names of values marked with `mlx_tune.keep` to save in each block.

    Returns:
        A handle: `.paths`, `.undo()`, a context manager that undoes, a table as `str`.

    Raises:
        CheckpointError: No block was found or selected; the text names what was looked at. Or one of them was made
            without `super().__init__()`.
        InvalidArgumentError: `every` is no positive integer, `select` neither a string nor a function of two arguments,
            `keep` no iterable of strings, `model` no module.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> model = nn.Transformer(dims=8, num_heads=2, num_encoder_layers=3, num_decoder_layers=2)
        >>> with mt.checkpoint_blocks(model, every=2) as handle:
        ...     print(*handle.paths)
        encoder.layers.0 encoder.layers.2 decoder.layers.0
    """
    every = whole_number(every, "every", least=1)
    names = names_of(keep)
    stacks = find_blocks(model, select)
    chosen = tuple(block for stack in stacks for block in stack[::every])
    require_initialized(chosen)
    handle = CheckpointHandle(tuple(path for path, _ in chosen), sum(map(len, stacks)), chosen, [], [])
    try:
        for _, module in chosen:
            if not is_checkpointed(module):
                checkpoint(module, keep=names)
                handle._wrapped.append(module)
            elif names and kept_names(module) != names:
                handle._renamed.append((module, kept_names(module)))
                checkpoint(module, keep=names)
    except BaseException:
        handle.undo()
        raise
    return handle


def find_blocks(model: nn.Module, select: Select | None = None) -> tuple[Stack, ...]:
    """Find the repeated blocks of a model.

    Args:
        model: The model.
        select: As in `checkpoint_blocks`.

    Returns:
        The stacks in the order of the model, each a tuple of (path, module) in order.

    Raises:
        CheckpointError: None was found or selected.
        InvalidArgumentError: `model` is no module, or `select` neither a string nor a function.

    Examples:
        >>> import mlx.nn as nn
        >>> model = nn.Sequential(nn.Linear(2, 2), *(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)))
        >>> [[path for path, _ in stack] for stack in find_blocks(model)]
        [['layers.1', 'layers.2']]
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"Blocks are looked for in an nn.Module, and this is {type(model).__name__}.")
    if select is not None:
        return _selected(model, select)
    stacks: list[Stack] = []
    _collect_stacks("", model, stacks)
    if not stacks:
        _collect_siblings("", model, stacks)
    if not stacks:
        raise CheckpointError(
            f"{type(model).__name__} has no repeated block: no list, tuple or dictionary in it has two modules that "
            "contain modules, and no two attributes next to each other share such a class. "
            f"Looked at {_looked_at(model)}. "
            "Name the blocks with select=, or wrap them one by one with mlx_tune.checkpoint(block)."
        )
    return tuple(stacks)


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks that a model repeats, each with its path; none where nothing is repeated."""
    try:
        return [block for stack in find_blocks(model) for block in stack]
    except CheckpointError:
        return []


def _children(module: object) -> list[tuple[str, object]]:
    """The members of a module, list, tuple or dictionary, by name."""
    if isinstance(module, dict):
        return [(str(key), value) for key, value in module.items()]
    if isinstance(module, list | tuple):
        return [(str(index), value) for index, value in enumerate(module)]
    return []


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has_modules(module: nn.Module) -> bool:
    """True where there is a module below this one."""
    return any(isinstance(child, nn.Module) or _holds_module(child) for _, child in _children(module))


def _holds_module(value: object) -> bool:
    return isinstance(value, list | tuple | dict) and any(
        isinstance(child, nn.Module) or _holds_module(child) for _, child in _children(value)
    )


def _collect_stacks(path: str, holder: object, stacks: list[Stack]) -> None:
    for name, child in _children(holder):
        below = _joined(path, name)
        if isinstance(child, nn.Module):
            _collect_stacks(below, child, stacks)
        elif isinstance(child, list | tuple | dict):
            blocks = [
                (_joined(below, key), value)
                for key, value in _children(child)
                if isinstance(value, nn.Module) and _has_modules(value)
            ]
            if len(blocks) > 1:
                stacks.append(tuple(blocks))
            else:
                _collect_stacks(below, child, stacks)


def _collect_siblings(path: str, holder: object, stacks: list[Stack]) -> None:
    """Attributes of one module that share a class with modules in it."""
    children = [(_joined(path, name), child) for name, child in _children(holder)]
    blocks = [(p, c) for p, c in children if isinstance(c, nn.Module) and _has_modules(c)]
    counts = Counter(type(module) for _, module in blocks)
    repeated = tuple((p, m) for p, m in blocks if counts[type(m)] > 1)
    if repeated:
        stacks.append(repeated)
    inside = {p for p, _ in repeated}
    for p, child in children:
        if p not in inside and isinstance(child, dict | list | tuple):
            _collect_siblings(p, child, stacks)


def _takes_two(select: object) -> bool:
    if not callable(select):
        return False
    try:
        signature = inspect.signature(select)
    except (TypeError, ValueError):
        return True  # it cannot be read: calling it will show
    try:
        signature.bind("", None)
    except TypeError:
        return False
    return True


def _selected(model: nn.Module, select: Select) -> tuple[Stack, ...]:
    if not isinstance(select, str) and not _takes_two(select):
        raise InvalidArgumentError(
            f"select={select!r} must be a pattern such as 'layers.*' or a function of path and module."
        )
    groups: dict[str, list[tuple[str, nn.Module]]] = {}

    def wanted(path: str, module: nn.Module) -> bool:
        return fnmatchcase(path, select) if isinstance(select, str) else bool(select(path, module))

    def visit(path: str, holder: object) -> None:
        for name, child in _children(holder):
            below = _joined(path, name)
            if isinstance(child, nn.Module) and wanted(below, child):
                groups.setdefault(path, []).append((below, child))
            else:
                visit(below, child)

    visit("", model)
    if not groups:
        raise CheckpointError(
            f"select={select!r} selects no module of {type(model).__name__}. Looked at {_looked_at(model)}."
        )
    return tuple(tuple(stack) for stack in groups.values())


def _looked_at(model: nn.Module) -> str:
    """The paths and classes of the modules below a model, the first few of them."""
    seen: list[str] = []

    def visit(path: str, holder: object) -> None:
        for name, child in _children(holder):
            below = _joined(path, name)
            if isinstance(child, nn.Module):
                seen.append(f"{below} ({type(child).__name__})")
            visit(below, child)

    visit("", model)
    if not seen:
        return "it, and it holds no modules at all"
    return format_names(seen, most=12)
