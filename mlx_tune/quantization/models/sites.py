"""Walking a model: its modules in order, what their weights are, and which of them are one and the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.interrupts import interruptible, uninterrupted

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)


@dataclass(frozen=True)
class Site:
    """A module of a model and every place where it stands.

    Attributes:
        paths: Dotted paths, the first as the walk finds it; more than one where a module is used twice.
        module: The module.
    """

    paths: tuple[str, ...]
    module: nn.Module

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]


def sites_of(model: nn.Module) -> list[Site]:
    """Every module below and including `model`, each once, in the order of definition.

    Examples:
        >>> [site.path for site in sites_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
        ['', 'layers.0', 'layers.1']
    """
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in _descend("", model):
        modules.setdefault(id(module), module)
        paths.setdefault(id(module), []).append(path)
    return [Site(tuple(paths[key]), module) for key, module in modules.items()]


def _descend(path: str, node: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(node, nn.Module):
        yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, child in items:
        if isinstance(child, (dict, list)):
            yield from _descend(f"{path}.{name}" if path else str(name), child)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; `""` is the model itself.

    Raises:
        KeyError: There is none.

    Examples:
        >>> module_at(nn.Sequential(nn.Linear(2, 3)), "layers.0").weight.shape
        (3, 2)
    """
    node = _node_at(model, path)
    if not isinstance(node, nn.Module):
        raise KeyError(f"{path!r} is a {type(node).__name__}, not a module")
    return node


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` points, in place."""
    head, _, name = path.rpartition(".")
    parent = _node_at(model, head)
    if isinstance(parent, list):
        parent[int(name)] = module
    else:
        parent[name] = module


def _node_at(model: nn.Module, path: str) -> Any:
    """The module, list or dictionary at a path."""
    node: Any = model
    for part in path.split(".") if path else ():
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


@contextmanager
def in_places(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have other modules stand at some paths of a model while the block runs."""
    olds = {path: module_at(model, path) for path in modules}
    with uninterrupted():
        try:
            for path, module in modules.items():
                put_module(model, path, module)
            with interruptible():
                yield
        finally:
            for path, old in olds.items():
                put_module(model, path, old)


def own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters, those in its own lists and dictionaries included, without those of modules below it.

    Examples:
        >>> list(own_arrays(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    return {name: array for key, value in module.items() if key[:1] != "_" for name, array in _arrays_in(key, value)}


def _arrays_in(name: str, value: object) -> Iterator[tuple[str, mx.array]]:
    if isinstance(value, mx.array):
        yield name, value
    elif isinstance(value, (dict, list)) and not isinstance(value, nn.Module):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _arrays_in(f"{name}.{key}", child)
