"""Second moments of layers' inputs: what a layer's output error depends on, gathered while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.capture import Hook


class InputMoments:
    """`x.T @ x` over all tokens that a layer was given: `[columns, columns]`, or one for each expert.

    Layers that were given the very same array share one sum.

    Args:
        modules: The layers by path.

    Attributes:
        tokens: How many inputs each layer was given, by path.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """Nothing has been seen yet."""
        self._paths = {id(module): path for path, module in modules.items()}
        self._modules = modules
        self._owner: dict[str, str] = {}
        self._sums: dict[str, mx.array] = {}
        self._calls: list[tuple[str, Any, Any]] = []
        self.tokens: dict[str, int] = dict.fromkeys(modules, 0)

    def hook(self) -> Hook:
        """What to intercept the layers with."""

        def see(module: nn.Module, method: str, run: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
            embeds = isinstance(module, nn.Embedding) and method == "__call__"
            # A lookup is a product with one-hot rows: no moments that could correct anything.
            if not embeds and arguments and isinstance(arguments[0], mx.array):
                indices = arguments[1] if len(arguments) > 1 else keywords.get("indices")
                stacked = module["weight"].ndim == 3
                self._calls.append((self._paths[id(module)], arguments[0], indices if stacked else None))
            return run(*arguments, **keywords)

        return see

    def collect(self) -> None:
        """Add up and evaluate what was seen since the last time."""
        calls, self._calls = self._calls, []
        if not self._owner:
            self._share(calls)
        for path, x, indices in calls:
            rows = x.shape[-1] and x.size // x.shape[-1]
            self.tokens[path] += indices.size if indices is not None else rows
            if self._owner[path] != path:
                continue
            if indices is None:
                flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
                added = flat.T @ flat
            else:
                added = self._by_expert(self._modules[path]["weight"].shape[0], x, indices)
            self._sums[path] = added if path not in self._sums else self._sums[path] + added
        mx.eval(self._sums)

    def of(self, path: str) -> mx.array | None:
        """The moments of one layer, or None where it was given nothing."""
        return self._sums.get(self._owner.get(path, path))

    def _share(self, calls: list[tuple[str, Any, Any]]) -> None:
        """Find layers whose every input was the same object as another's."""
        seen: dict[str, list[tuple[int, int]]] = {}
        for path, x, indices in calls:
            seen.setdefault(path, []).append((id(x), id(indices)))
        first: dict[tuple[tuple[int, int], ...], str] = {}
        for path in self._modules:
            self._owner[path] = first.setdefault(tuple(seen[path]), path) if path in seen else path

    @staticmethod
    def _by_expert(experts: int, x: mx.array, indices: mx.array) -> mx.array:
        """Sums for each expert. `x` is `[..., rows, columns]`, as `mx.gather_mm` takes it."""
        lead = mx.broadcast_shapes(x.shape[:-2], indices.shape)
        x = mx.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:]).astype(mx.float32)
        chosen: Any = mx.broadcast_to(indices, lead).reshape(-1)
        order = mx.argsort(chosen)
        counts: Any = (chosen[:, None] == mx.arange(experts)[None]).sum(0).tolist()
        sums, start = [], 0
        for count in counts:
            rows = x[order[start : start + count]].reshape(-1, x.shape[-1])
            sums.append(rows.T @ rows)
            start += count
        return mx.stack(sums)
