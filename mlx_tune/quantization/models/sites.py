"""Walking a model: its modules in order, what their weights are, and which of them are one and the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.formats.modes import Format

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


def walk(model: nn.Module) -> list[Site]:
    """Every module below and including `model`, each once, in the order of definition.

    Examples:
        >>> [site.path for site in walk(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
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
    node: Any = model
    for part in path.split(".") if path else ():
        node = node[int(part)] if isinstance(node, list) else node[part]
    if not isinstance(node, nn.Module):
        raise KeyError(f"{path!r} is a {type(node).__name__}, not a module")
    return node


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` points, in place."""
    head, _, name = path.rpartition(".")
    parent: Any = model
    for part in head.split(".") if head else ():
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    if isinstance(parent, list):
        parent[int(name)] = module
    else:
        parent[name] = module


def own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters, those in its own lists and dictionaries included, without those of modules below it.

    Examples:
        >>> list(own_arrays(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    return {name: array for key, value in module.items() if key[:1] != "_" for name, array in _arrays_in(key, value)}


def _arrays_in(name: str, value: Any) -> Iterator[tuple[str, mx.array]]:
    if isinstance(value, mx.array):
        yield name, value
    elif isinstance(value, (dict, list)) and not isinstance(value, nn.Module):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _arrays_in(f"{name}.{key}", child)


def is_quantized(module: nn.Module) -> bool:
    """True where the module holds packed weights."""
    return "scales" in module and hasattr(module, "bits") and hasattr(module, "group_size")


def current_format(module: nn.Module) -> Format:
    """The format of a module that is quantized already."""
    quantize_input = isinstance(module, nn.QQLinear)
    return Format(module.bits, module.group_size, getattr(module, "mode", "affine"), quantize_input)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weights as numbers, packed or not."""
    shape = module["weight"].shape
    if is_quantized(module):
        return (*shape[:-1], module["scales"].shape[-1] * module.group_size)
    return tuple(shape)


def parameter_count(module: nn.Module, arrays: dict[str, mx.array]) -> int:
    """The number of unquantized parameters that the given ones of a module stand for, as mlx-lm counts them."""
    if not is_quantized(module):
        return sum(a.size for a in arrays.values())
    count = 0
    for name, array in arrays.items():
        if name == "weight":
            count += array.size * 32 // module.bits
        elif name not in ("scales", "biases", "global_scale"):
            count += array.size
    return count


def why_not_quantizable(module: nn.Module, mode: str) -> str | None:
    """None where the module can take packed weights of that mode, else the reason."""
    name = type(module).__name__
    if not callable(getattr(module, "to_quantized", None)):
        return f"{name} has no quantized form in MLX"
    weight = module.get("weight")
    if not isinstance(weight, mx.array):
        return f"{name} holds no weight of its own"
    if weight.ndim < 2:
        return f"its weight has {weight.ndim} axis, MLX packs two or more"
    if weight.dtype not in _FLOATS:
        return f"its weight is {_name(weight.dtype)}, not a floating point number"
    if mode != "affine" and not takes_mode(module.to_quantized):
        return f"{name} can be quantized in mode 'affine' only"
    return None


def takes_mode(to_quantized: Callable[..., Any]) -> bool:
    """True where a layer's `to_quantized` knows of modes; those that are older than modes do not."""
    accepted = inspect.signature(to_quantized).parameters
    return "mode" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())


def find_routers(sites: list[Site]) -> set[int]:
    """Ids of the modules that choose a token's experts: a small error there sends it elsewhere.

    A router is a layer beside a stack of experts (weights with a first axis of E experts) with E outputs, or one
    that weighs the shared expert with a single output, and is named a gate or a router.
    """
    by_path = {path: site.module for site in sites for path in site.paths}
    found: set[int] = set()
    experts: dict[str, int] = {}
    for path, module in by_path.items():
        weight = module.get("weight")
        if isinstance(weight, mx.array) and weight.ndim == 3:
            # layers.3.mlp.switch_mlp.up_proj: the router is at layers.3.mlp.gate or layers.3.router.proj.
            home = path.rpartition(".")[0].rpartition(".")[0]
            experts[home] = weight.shape[0]
    for path, module in by_path.items():
        weight = module.get("weight")
        if not isinstance(weight, mx.array) or weight.ndim != 2:
            continue
        parent, _, name = path.rpartition(".")
        named = name if "gate" in name or "router" in name else parent.rpartition(".")[2]
        homes = {parent, parent.rpartition(".")[0]}
        count = next((experts[home] for home in homes if home in experts), None)
        if count is not None and ("gate" in named or "router" in named) and weight.shape[0] in (count, 1):
            found.add(id(module))
    return found


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
