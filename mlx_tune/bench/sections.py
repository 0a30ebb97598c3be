"""The table of claims: which measurement says something about which sentence, and on which page that stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx_tune.bench import by_the_doctor, products, training, verdicts
from mlx_tune.bench.sizes import Sizes
from mlx_tune.bench.verdicts import Figures, Verdict
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.presentation.plain import Json


@dataclass(frozen=True)
class Claim:
    """One sentence that figures can hold up or not.

    Attributes:
        name: As files name it.
        text: The sentence.
        page: The page below `docs/` that claims it.
        judge: The verdict from a section's figures.
    """

    name: str
    text: str
    page: str
    judge: Callable[[Figures], Verdict]


@dataclass(frozen=True)
class Section:
    """A measurement, and the claims that it judges.

    Attributes:
        name: As `--only` takes it.
        measure: Measures at some sizes, within so many bytes; raises `LeftOutError` where that cannot be.
        claims: The claims.
    """

    name: str
    measure: Callable[[Sizes, int], dict[str, Json]]
    claims: tuple[Claim, ...]


def _checkpointing(sizes: Sizes, room: int) -> dict[str, Json]:
    return {**by_the_doctor.checkpointed_step(sizes, room), "gradients": training.gradients(sizes, room)}


#: Those that compile most come last: on CUDA a kernel takes half a minute at its first use.
SECTIONS = (
    Section(
        "lazy",
        by_the_doctor.lazy_graph,
        (
            Claim(
                "building-takes-no-memory",
                "Building a graph of operations takes no memory for their results.",
                "concepts/lazy-and-unified.md",
                verdicts.building_takes_no_memory,
            ),
            Claim(
                "evaluating-does-the-work",
                "Evaluating a graph takes longer than building it.",
                "concepts/lazy-and-unified.md",
                verdicts.evaluating_does_the_work,
            ),
        ),
    ),
    Section(
        "unified",
        by_the_doctor.shared_array,
        (
            Claim(
                "nobody-copies",
                "The processor and the GPU read one array without a second copy of it.",
                "concepts/lazy-and-unified.md",
                verdicts.nobody_copies,
            ),
        ),
    ),
    Section(
        "floors",
        training.floors,
        (
            Claim(
                "floor",
                "The predicted floor of a training step is within 5 % of its least peak, every operation held back.",
                "measurements/estimates.md",
                verdicts.floor_is_foreseen,
            ),
            Claim(
                "peak",
                "Without a limit a step peaks at no more than was predicted.",
                "measurements/gpu.md",
                verdicts.peak_is_bounded,
            ),
        ),
    ),
    Section(
        "limit",
        training.limits,
        (
            Claim(
                "limit-holds",
                "Under a memory limit a checkpointed step peaks at most 10 % above the limit, or above its floor.",
                "measurements/gpu.md",
                verdicts.limit_holds_peaks,
            ),
            Claim(
                "limit-is-cheap",
                "There is a limit that takes memory off a checkpointed step, and at most 2 % of its speed.",
                "measurements/gpu.md",
                verdicts.limit_is_cheap,
            ),
        ),
    ),
    Section(
        "checkpointing",
        _checkpointing,
        (
            Claim(
                "gradients",
                "Checkpointed blocks give the gradients of plain ones.",
                "measurements/checkpointing.md",
                verdicts.gradients_are_equal,
            ),
            Claim(
                "checkpoints-save",
                "Held back, a step with checkpointed blocks peaks below the plain one.",
                "measurements/checkpointing.md",
                verdicts.checkpoints_save,
            ),
            Claim(
                "checkpoints-cost",
                "Checkpointed blocks cost at most half of a plain step's time more.",
                "measurements/checkpointing.md",
                verdicts.checkpoints_cost_a_forward_pass,
            ),
        ),
    ),
    Section(
        "autobatch",
        training.search,
        (
            Claim(
                "trials-within",
                "No trial of autobatch goes above its budget, where the step can be traced.",
                "measurements/autobatch.md",
                verdicts.trials_stay_within,
            ),
            Claim(
                "answer-within",
                "Training at autobatch's answer stays within the budget.",
                "measurements/autobatch.md",
                verdicts.answer_trains_within,
            ),
            Claim(
                "search-is-short",
                "A search takes the time of at most 25 steps of its answer, first steps left out.",
                "measurements/autobatch.md",
                verdicts.search_is_short,
            ),
        ),
    ),
    Section(
        "wiring",
        by_the_doctor.wired_sweep,
        (
            Claim(
                "wiring-gains-nothing",
                "Wiring weights that leave memory free gains no speed.",
                "measurements/wiring.md",
                verdicts.wiring_gains_nothing,
            ),
        ),
    ),
    Section(
        "products",
        products.products,
        (
            Claim(
                "packed-size",
                "Weights of 4 bits in groups of 64 take 71.9 % less than bfloat16.",
                "measurements/claims.md",
                verdicts.packed_size,
            ),
            Claim(
                "one-row",
                "For one row 4 bits multiply at least as fast as bfloat16, as is reported of Apple GPUs.",
                "guides/quantize.md",
                verdicts.one_row_is_faster,
            ),
            Claim(
                "many-rows",
                "For many rows 4 bits multiply slower than bfloat16.",
                "concepts/claims.md",
                verdicts.many_rows_are_slower,
            ),
        ),
    ),
    Section(
        "kernels",
        by_the_doctor.right_kernels,
        (
            Claim(
                "kernels-are-right",
                "Products with packed weights come out right in the shapes of common models.",
                "upstream.md",
                verdicts.kernels_are_right,
            ),
        ),
    ),
)


def choose(only: list[str] | None) -> tuple[Section, ...]:
    """The sections of these names, in the order of the table; all of them for None.

    Raises:
        InvalidArgumentError: There is none of a name; the text lists them.

    Examples:
        >>> [section.name for section in choose(["floors", "lazy"])]
        ['lazy', 'floors']
    """
    names = [section.name for section in SECTIONS]
    for name in only or ():
        if name not in names:
            raise InvalidArgumentError(f"There is no section {name!r}. There are: {', '.join(names)}.")
    return tuple(section for section in SECTIONS if only is None or section.name in only)
