"""Recording what layers are given while a model runs, and running a model one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_tune.substitution import subclass, substituted

#: Ways in which modules are called; a tied embedding is an output head through the second.
_METHODS = ("__call__", "as_linear")


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        module: The module.
        name: The method that was called: "__call__" or "as_linear".
        arguments: The positional arguments.
        keywords: The arguments by name.
        method: The module's own method, for `run`.
    """

    module: nn.Module
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, object]
    method: Callable[..., object]

    def run(self) -> Any:
        """Call the module itself."""
        return self.method(self.module, *self.arguments, **self.keywords)

    @property
    def inputs(self) -> mx.array | None:
        """The first argument, where that is an array."""
        return self.arguments[0] if self.arguments and isinstance(self.arguments[0], mx.array) else None

    @property
    def experts(self) -> Any:
        """The experts that each input goes to, where the module is a stack of them."""
        return self.arguments[1] if len(self.arguments) > 1 else self.keywords.get("indices")

    @property
    def looks_up(self) -> bool:
        """True where tokens are looked up in an embedding: no product with its weights."""
        return isinstance(self.module, nn.Embedding) and self.name == "__call__"


#: Sees a call, and gives back what it is to give back.
Hook = Callable[[ModuleCall], object]


class _Enough(BaseException):  # no error: everything that was wanted has been seen
    """Ends a model's call from inside."""


@contextmanager
def intercepted(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Route every call of these module objects, and of no others, through a hook while the block runs.

    Args:
        modules: The modules; one named twice is intercepted once.
        hook: Called instead of the module.

    Examples:
        >>> seen = []
        >>> layer = nn.Linear(2, 2)
        >>> with intercepted([layer], lambda call: seen.append(call.inputs.shape) or call.run()):
        ...     y = layer(mx.ones((3, 2)))
        >>> seen
        [(3, 2)]
    """
    with substituted((module, _listening(type(module), hook)) for module in modules):
        yield


def _listening(kind: type, hook: Hook) -> type:
    def through(name: str) -> Callable[..., object]:
        method = getattr(kind, name)

        def call(self: Any, *arguments: Any, **keywords: object) -> object:
            return hook(ModuleCall(self, name, arguments, keywords, method))

        return call

    return subclass(kind, {name: through(name) for name in _METHODS if hasattr(kind, name)})


@dataclass(frozen=True)
class Step:
    """One step of a model's forward pass: a block, or a layer outside of all blocks.

    Attributes:
        path: Of the block or the layer.
        module: It.
        follows: Path of the step whose output is this one's first argument and whose model-given arguments were
            the same as those of an earlier step, so that it can be called without the model; None where it cannot.
        like: Path of the step whose further arguments this one shares; itself where it brings new ones.
        calls: The number of its calls in one pass.
    """

    path: str
    module: nn.Module
    follows: str | None
    like: str
    calls: int


def forward_steps(
    call: Callable[[], object],
    layers: Sequence[tuple[str, nn.Module]],
    blocks: Sequence[tuple[str, nn.Module]] = (),
) -> list[Step]:
    """Find the order in which a model calls its blocks and those of the given layers that are in none.

    The model is called once, and nothing is evaluated.

    Args:
        call: Calls the model once.
        layers: Paths and modules.
        blocks: The same of what is repeated in the model; where nothing is, every layer is a step of its own.

    Returns:
        The steps in the order of their first calls. A layer that is not called is in none.
    """
    inside = tuple(f"{path}." for path, _ in blocks)
    units = [*blocks, *((p, m) for p, m in layers if not p.startswith(inside) and p not in dict(blocks))]
    names = {id(module): path for path, module in units}
    order: list[tuple[str, tuple[object, ...], dict[str, object], object]] = []

    def note(call: ModuleCall) -> object:
        output = call.run()
        order.append((names[id(call.module)], call.arguments, call.keywords, output))
        return output

    with intercepted((module for _, module in units), note):
        call()
    modules, paths = dict(units), [name for name, *_ in order]
    block_paths = {path for path, _ in blocks}
    steps: dict[str, Step] = {}
    sources: list[tuple[str, list[object]]] = []
    last: tuple[str, object] | None = None
    for path, arguments, keywords, output in order:
        extras = _leaves((arguments[1:], keywords))
        like = next((name for name, known in sources if _same(known, extras)), path)
        if path in block_paths and like == path:
            sources.append((path, extras))
        chained = (
            last is not None
            and path in block_paths
            and like != path
            and paths.count(path) == 1
            and isinstance(last[1], mx.array)
            and bool(arguments)
            and arguments[0] is last[1]
        )
        if path not in steps:
            steps[path] = Step(path, modules[path], last[0] if chained and last else None, like, paths.count(path))
        if path in block_paths:
            last = (path, output)
    return list(steps.values())


def run_until(call: Callable[[], object], module: nn.Module, calls: int, hook: Hook) -> None:
    """Call a model up to the last call of one module, whose calls go through a hook.

    Args:
        call: Calls the model once.
        module: Whose calls are wanted.
        calls: The number of them.
        hook: Sees them. The last one's output is not used.
    """
    left = calls

    def counting(seen: ModuleCall) -> object:
        nonlocal left
        left -= 1
        output = hook(seen)
        if left == 0:
            raise _Enough
        return output

    with intercepted([module], counting):
        try:
            call()
        except _Enough:
            return


def _leaves(tree: object) -> list[object]:
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat]


def _same(known: list[object], found: list[object]) -> bool:
    """True where two calls were given the same further arguments: the very same arrays, and equal plain values."""
    if len(known) != len(found):
        return False
    plain = (str, int, float, bool, type(None))
    return all(
        a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b) for a, b in zip(known, found, strict=True)
    )
