"""Which products with packed weights a model needs of its backend, and which of those the backend computes right.

Numbers in, verdicts out: nothing here touches a device. `kernel_trials` multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mlx_tune.quantization.formats.modes import Format

#: How packed weights are used: a matrix times rows, a stack of matrices times a stack of rows, a stack of which each
#: row picks its matrix, or rows of the weights themselves.
Use = Literal["product", "batched", "gathered", "lookup"]

#: Unit roundoff. Products of float32 may round their factors to TF32's ten bits, as CUDA and newer Apple GPUs do.
_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-11}

#: The smallest and the largest number of rows that are tried. One row has kernels of its own everywhere, and from
#: eight on CUDA leaves those for products of matrices.
FEW_ROWS, MANY_ROWS = 1, 8

#: Outputs that are tried at most. A processor's kernel treats outputs alike, one after another. CUDA's choice of a
#: kernel looks at the remainder by 128, Metal's at that by 8 and 32 and at the bounds 2,048 and 4,096.
_OUTPUTS_CPU, _OUTPUTS_GPU, _TILE = 32, 4096, 128

#: Where faults that are known are written down.
PAGE = "docs/upstream.md"


@dataclass(frozen=True)
class Combination:
    """Everything that decides which kernel MLX runs with a layer's packed weights.

    Attributes:
        use: The use of the weights.
        inputs: Width of a row of weights.
        outputs: Rows of weights, cut to what decides on the kernel.
        format: Their storage format.
        dtype: Of the inputs, and of scales where the format has none of its own.
    """

    use: Use
    inputs: int
    outputs: int
    format: Format
    dtype: str

    def __str__(self) -> str:
        """Short text for sentences."""
        what = {"product": "product", "batched": "batched product", "gathered": "gathered product", "lookup": "lookup"}
        return f"{what[self.use]} of {self.inputs} inputs in {self.format}, {self.dtype}"

    @property
    def trials(self) -> tuple[KernelTrial, ...]:
        """The multiplications that decide."""
        if self.use == "lookup":
            return (KernelTrial(MANY_ROWS),)
        if self.use == "gathered":  # rows in the order of their experts have a kernel of their own on Metal
            return KernelTrial(FEW_ROWS), KernelTrial(MANY_ROWS), KernelTrial(MANY_ROWS, in_order=True)
        return KernelTrial(FEW_ROWS), KernelTrial(MANY_ROWS)


@dataclass(frozen=True)
class KernelTrial:
    """One multiplication.

    Attributes:
        rows: Rows of inputs.
        in_order: True where rows are sorted by the matrix that they pick, and MLX is told so.
    """

    rows: int
    in_order: bool = False

    def __str__(self) -> str:
        """Short text for sentences."""
        return f"{self.rows} row{'' if self.rows == 1 else 's'}{' in order' if self.in_order else ''}"


@dataclass(frozen=True)
class Fault:
    """A kernel that is wrong or missing.

    Attributes:
        combination: The combination that was tried.
        trial: The multiplication at which it showed.
        error: The relative error, NaN or infinite included; None where there is no kernel.
        message: MLX's own words where there is none.
        backend: "metal", "cuda" or "cpu".
    """

    combination: Combination
    trial: KernelTrial
    error: float | None
    message: str
    backend: str

    @property
    def reason(self) -> str:
        """A few words, for a layer's row."""
        where = f"{self.combination.use}, {self.combination.inputs} inputs, {self.trial}"
        return f"MLX {'cannot do this' if self.error is None else 'computes it wrong'} here ({where})"

    def __str__(self) -> str:
        """The whole of it, with where to read more."""
        told = f"MLX's {self.combination} at {self.trial}"
        if self.error is None:
            text = f"{told} does not exist on this backend ({self.backend}): {self.message.rstrip('.')}"
        else:
            allowed = tolerance(self.combination, self.backend)
            text = (
                f"{told} is wrong on this backend ({self.backend}): off from the dequantized product by "
                f"{_percent(self.error)}, where rounding explains {_percent(allowed)} at most"
            )
        return f"{text}. {upstream(self)}"


#: The relative error of one multiplication on the device; RuntimeError or ValueError where MLX has no kernel for it.
Measure = Callable[[Combination, KernelTrial], float]


def combinations(
    uses: Iterable[Use], shape: tuple[int, ...], wanted: Format, dtype: str, backend: str
) -> Iterator[Combination]:
    """Everything that MLX is asked to compute with one layer.

    Args:
        uses: The uses of its weights.
        shape: Of the weights as numbers.
        wanted: Their format.
        dtype: Of the unquantized weights.
        backend: "metal", "cuda" or "cpu".

    Examples:
        >>> [found.outputs for found in combinations(["product"], (128_000, 64), Format(4, 64), "bfloat16", "cuda")]
        [4224]
    """
    for use in uses:
        # A lookup unpacks rows, whose number decides nothing.
        outputs = MANY_ROWS if use == "lookup" else cut_outputs(shape[-2], backend)
        yield Combination(use, shape[-1], outputs, wanted, dtype)


def cut_outputs(outputs: int, backend: str) -> int:
    """The fewest outputs for which a backend chooses the kernel that it chooses for so many.

    Examples:
        >>> cut_outputs(14_336, "cpu"), cut_outputs(1000, "cuda"), cut_outputs(50_257, "metal")
        (32, 1000, 4305)
    """
    if backend == "cpu":
        return min(outputs, _OUTPUTS_CPU)
    return outputs if outputs <= _OUTPUTS_GPU + _TILE else _OUTPUTS_GPU + _TILE + outputs % _TILE


def tolerance(combination: Combination, backend: str) -> float:
    """The largest relative error that rounding explains.

    Rounding the weights, the products and the result costs a few units of the dtype, however many there are. Sums that
    are kept in the dtype cost more the longer they are: their errors add up like a random walk, by the square root of
    the width. MLX's processor kernels keep whole sums so, those of GPUs a few terms of each. What is wrong is off by
    its own size: 1, or more.

    Args:
        combination: The factors.
        backend: "metal", "cuda" or "cpu".

    Examples:
        >>> round(tolerance(Combination("product", 1024, 128, Format(4, 64), "bfloat16"), "cuda"), 4)
        0.0234
    """
    unit, walk = _ROUNDOFF[combination.dtype], math.sqrt(combination.inputs)
    if combination.format.quantize_input:
        unit, walk = 2.0**-4, 0.0  # inputs in eight bits or four: their own error is in the reference, ties are not
    if combination.format.scale_dtype == "bfloat16":
        unit = max(unit, _ROUNDOFF["bfloat16"])
    if combination.use == "lookup":
        return 4 * unit
    return unit * (4 + (walk if backend == "cpu" else walk / 16))


def judge(combination: Combination, measure: Measure, backend: str) -> Fault | None:
    """Try a combination, and stop at the first multiplication that is wrong or missing.

    Args:
        combination: The combination to try.
        measure: Multiplies.
        backend: "metal", "cuda" or "cpu".

    Examples:
        >>> wanted = Combination("product", 64, 64, Format(4, 64), "bfloat16")
        >>> judge(wanted, lambda combination, trial: 1.0 if trial.rows > 1 else 1e-3, "cuda").trial
        KernelTrial(rows=8, in_order=False)
    """
    for trial in combination.trials:
        try:
            error = measure(combination, trial)
        except (RuntimeError, ValueError) as missing:
            return Fault(combination, trial, None, str(missing), backend)
        if not error <= tolerance(combination, backend):  # NaN is wrong too
            return Fault(combination, trial, error, "", backend)
    return None


def upstream(fault: Fault) -> str:
    """A sentence on what is known of a fault upstream."""
    found, wanted = fault.combination, fault.combination.format
    if fault.backend == "cuda" and (fault.error is None or wanted.bits == 1):
        return f"Upstream: https://github.com/ml-explore/mlx/issues/2536, and {PAGE}."
    one_group = wanted.mode == "affine" and wanted.bits in (4, 8) and found.inputs == wanted.group_size
    if fault.backend == "cuda" and one_group and found.use in ("product", "batched"):
        return f"Upstream: the kernel of https://github.com/ml-explore/mlx/pull/3160, see {PAGE}."
    return f"It is not in the list of known ones ({PAGE}): report it at https://github.com/ml-explore/mlx/issues."


def note_of(faults: Iterable[tuple[Fault, int]], became: str) -> tuple[str, ...]:
    """Notes for a plan: each fault once, and the number of layers that got something else for it.

    Args:
        faults: Each fault, and its number of layers.
        became: The fate of those layers, such as "left unpacked".
    """
    counts: dict[Fault, int] = {}
    for fault, layers in faults:
        counts[fault] = counts.get(fault, 0) + layers
    return tuple(
        f"Warning: {fault} {count} layer{' was' if count == 1 else 's were'} {became} for it; "
        "verify_kernels=False packs in spite of it."
        for fault, count in counts.items()
    )


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %" if share < 10 else f"{share:.2g} times"
