"""Second moments of layers' inputs: what a layer's output error depends on, gathered while a model runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.measuring.float32_products import matmul_float32

#: One call of a layer: its path, its inputs and, of a stack of experts, which of them each input went to.
Seen = tuple[str, mx.array, "mx.array | None"]


class Drift(NamedTuple):
    """The drift of a layer's inputs: `d = x before - x now`, summed over tokens.

    Attributes:
        cross: `d.T @ x now`, `[columns, columns]`.
        own: `d.T @ d`, `[columns, columns]`; None where it was not asked for.
    """

    cross: mx.array
    own: mx.array | None = None


class InputMoments:
    """`x.T @ x` over all tokens that a layer was given: `[columns, columns]`, or one for each expert.

    Layers that were given the very same array share one sum.

    Args:
        modules: The layers by path.
        own_drift: True where drifts are to hold the moments of the drift itself, which measuring errors takes.

    Attributes:
        tokens: The number of inputs that each layer was given, by path.
    """

    def __init__(self, modules: dict[str, nn.Module], *, own_drift: bool = False) -> None:
        """Begin with nothing seen."""
        self._paths = {id(module): path for path, module in modules.items()}
        self._modules = modules
        self._owner: dict[str, str] = {}
        self._sums: dict[str, mx.array] = {}
        self._calls: list[Seen] = []
        self._own_drift = own_drift
        self._drifts: dict[str, Drift] = {}
        self._without_drift: set[str] = set()
        self.tokens: dict[str, int] = dict.fromkeys(modules, 0)
        self._experts: dict[str, list[int]] = {}

    def see(self, module: nn.Module, x: mx.array, experts: mx.array | None) -> None:
        """Note one call of a layer, for `collect`.

        Args:
            module: The layer.
            x: Its inputs, `[..., columns]`.
            experts: The experts that each of them goes to, where the layer is a stack.
        """
        self._calls.append((self._paths[id(module)], x, experts if module["weight"].ndim == 3 else None))

    def take(self) -> list[Seen]:
        """The calls seen since the last time, for `collect`."""
        calls, self._calls = self._calls, []
        return calls

    def collect(self, before: list[Seen] | None = None) -> None:
        """Add up and evaluate what was seen since the last time.

        Args:
            before: The same calls as the unquantized model makes them, to learn how far inputs have moved.
        """
        calls = self.take()
        if not self._owner:
            self._share(calls)
        if before is None or [path for path, *_ in before] != [path for path, *_ in calls]:
            self._without_drift.update(path for path, *_ in calls)
        else:
            for (path, x, indices), (_, earlier, _) in zip(calls, before, strict=True):
                self._add_drift(path, x, indices, earlier)
        for path, x, indices in calls:
            rows = x.shape[-1] and x.size // x.shape[-1]
            self.tokens[path] += indices.size if indices is not None else rows
            if self._owner[path] != path:
                continue
            if indices is None:
                flat = x.reshape(-1, x.shape[-1])
                added = matmul_float32(flat.T, flat)
            else:
                experts = self._modules[path]["weight"].shape[0]
                counts = count_experts(
                    mx.broadcast_to(indices, mx.broadcast_shapes(x.shape[:-2], indices.shape)), experts
                )
                before_them = self._experts.get(path, [0] * experts)
                self._experts[path] = [a + b for a, b in zip(before_them, counts, strict=True)]
                added = self._by_expert(counts, x, indices)
            self._sums[path] = added if path not in self._sums else self._sums[path] + added
        mx.eval(self._sums, self._drifts)

    def of(self, path: str) -> mx.array | None:
        """The moments of one layer, or None where it was given nothing."""
        return self._sums.get(self._owner.get(path, path))

    def experts_of(self, path: str) -> list[int] | None:
        """The number of inputs of each expert of a stack; None for other layers."""
        return self._experts.get(self._owner.get(path, path))

    def drift_of(self, path: str) -> Drift | None:
        """The drift of one layer's inputs, or None where not all its calls could be compared."""
        owner = self._owner.get(path, path)
        return None if owner in self._without_drift else self._drifts.get(owner)

    def _add_drift(self, path: str, x: mx.array, indices: mx.array | None, earlier: mx.array) -> None:
        if self._owner[path] != path:
            return
        # Experts may have been given other tokens before, so that there is nothing to compare.
        if indices is not None or earlier.shape != x.shape:
            self._without_drift.add(path)
            return
        now = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        d = earlier.reshape(now.shape).astype(mx.float32) - now
        added = Drift(matmul_float32(d.T, now), matmul_float32(d.T, d) if self._own_drift else None)
        if path in self._drifts:
            old = self._drifts[path]
            own = None if old.own is None or added.own is None else old.own + added.own
            added = Drift(old.cross + added.cross, own)
        self._drifts[path] = added

    def _share(self, calls: list[Seen]) -> None:
        """Find layers whose every input was the same object as another's."""
        seen: dict[str, list[tuple[int, int]]] = {}
        for path, x, indices in calls:
            seen.setdefault(path, []).append((id(x), id(indices)))
        first: dict[tuple[tuple[int, int], ...], str] = {}
        for path in self._modules:
            self._owner[path] = first.setdefault(tuple(seen[path]), path) if path in seen else path

    @staticmethod
    def _by_expert(counts: list[int], x: mx.array, indices: mx.array) -> mx.array:
        """Sums for each expert. `x` is `[..., rows, columns]`, as `mx.gather_mm` takes it."""
        lead = mx.broadcast_shapes(x.shape[:-2], indices.shape)
        x = mx.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
        chosen: Any = mx.broadcast_to(indices, lead).reshape(-1)
        order = mx.argsort(chosen)
        sums, start = [], 0
        for count in counts:
            rows = x[order[start : start + count]].reshape(-1, x.shape[-1])
            sums.append(matmul_float32(rows.T, rows))
            start += count
        return mx.stack(sums)


def count_experts(indices: mx.array, experts: int) -> list[int]:
    """The number of times that each expert is chosen.

    Examples:
        >>> count_experts(mx.array([[0, 2], [2, 1]]), 4)
        [1, 1, 2, 0]
    """
    chosen: Any = indices.reshape(-1, 1) == mx.arange(experts)
    counts: list[int] = chosen.sum(0).tolist()
    return counts
