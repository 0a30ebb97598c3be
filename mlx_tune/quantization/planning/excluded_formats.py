"""Formats that MLX computes wrong, taken off the choices of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.planning.kernels import Fault, note_of
from mlx_tune.quantization.planning.plan import LayerPlan

#: The fault of a layer in a format, or None.
FaultOf = Callable[[LayerPlan, Format], Fault | None]


class ExcludedFormats:
    """Takes formats that MLX computes wrong off the choices of layers, as they come up.

    Trying every format of every layer would compile and run a kernel for each; most are never chosen.

    Args:
        choices: Formats of each layer by its path, and what is known of each; wrong ones are taken out of it.
        fault_of: Finds the fault of a layer in a format; None takes nothing out.
    """

    def __init__(self, choices: dict[str, dict[Format, float]], fault_of: FaultOf | None) -> None:
        self._choices, self._fault_of = choices, fault_of
        self._found: dict[tuple[str, Format], Fault] = {}

    def drops(self, layer: LayerPlan, wanted: Format) -> bool:
        """True where this format of the layer is wrong; it is no longer among the choices then."""
        fault = None if self._fault_of is None else self._fault_of(layer, wanted)
        if fault is not None:
            self._choices[layer.path].pop(wanted, None)
            self._found[layer.path, wanted] = fault
        return fault is not None

    def take_out(self, picked: Iterable[tuple[LayerPlan, Format | None]]) -> bool:
        """Look at what was picked for layers; True where any of it is wrong, so that another pick is needed."""
        wrong = [layer for layer, wanted in picked if wanted is not None and self.drops(layer, wanted)]
        return bool(wrong)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for a plan."""
        return note_of(((fault, 1) for fault in self._found.values()), "given another format")
