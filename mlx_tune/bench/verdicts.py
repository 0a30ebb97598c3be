"""The verdict on a claim from figures: pure functions, which measure nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mlx_tune.units import format_bytes, format_percent, format_seconds

#: The figures of a section: plain values under names.
Figures: TypeAlias = Mapping[str, Any]

#: The worst floor on the page of estimates is 4.9 % off, a GPU's 2.5 %.
_FLOOR_ERROR = 0.05
#: The allocator's rounding, and what another thread of MLX's holds for a moment.
_SLACK = 0.02
#: A limit may be missed by so much: on the page of the GPU peaks are up to 10 % above, save on one ridge.
_LIMIT_MISSED = 0.1
#: A standard error of a slowdown above which it says nothing.
_SCATTER = 0.05
#: One more forward pass is half of a step of forward and backward.
_RECOMPUTING = 0.5
#: The longest search on the page of autobatch took 21 steps of its answer.
_SEARCH_STEPS = 25
#: "4 bits, group 64": half a byte and two bfloat16 numbers for 64 weights.
_FOUR_BITS, _FOUR_BITS_SHARE = "4 bits, group 64", 0.28125
#: Wiring gains from here on, if it is clear of noise.
_GAIN = 0.02


@dataclass(frozen=True)
class Verdict:
    """A claim beside what was measured.

    Attributes:
        measured: Short text.
        holds: None where this machine cannot tell.
    """

    measured: str
    holds: bool | None


def floor_is_foreseen(figures: Figures) -> Verdict:
    """Predicted floors against the least peaks.

    Examples:
        >>> step = {"predicted_floor_bytes": 101, "floor_bytes": 100}
        >>> floor_is_foreseen({"plain": step, "checkpointed": step})
        Verdict(measured='plain +1.0 %, checkpointed +1.0 %', holds=True)
    """
    errors = {name: step["predicted_floor_bytes"] / step["floor_bytes"] - 1 for name, step in figures.items()}
    said = ", ".join(f"{name} {100 * error:+.1f} %" for name, error in errors.items())
    return Verdict(said, all(abs(error) <= _FLOOR_ERROR for error in errors.values()))


def peak_is_bounded(figures: Figures) -> Verdict:
    """Free peaks against the most that was predicted."""
    shares = {name: step["peak_bytes"] / step["predicted_peak_bytes"] for name, step in figures.items()}
    said = ", ".join(f"{name} {format_percent(share, 0)} of it" for name, share in shares.items())
    return Verdict(said, all(share <= 1 + _SLACK for share in shares.values()))


def limit_holds_peaks(figures: Figures) -> Verdict:
    """Peaks under limits against the limit, or the floor where that is higher."""
    least = figures["held_back_peak_bytes"]
    missed = max(point["peak_bytes"] / max(point["limit_bytes"], least) - 1 for point in figures["curve"])
    said = f"at most {format_percent(max(0.0, missed))} above, from {format_bytes(figures['free_peak_bytes'])} free"
    return Verdict(f"{said} to {format_bytes(least)} held back", missed <= _LIMIT_MISSED)


def limit_is_cheap(figures: Figures) -> Verdict:
    """Memory that the limit chosen takes off a free step, and the speed that it costs; unknown where steps scatter."""
    best, free = figures["tightest"], figures["free_peak_bytes"]
    saved, slowdown, uncertainty = 1 - best["peak_bytes"] / free, best["slowdown"], best["uncertainty"]
    said = f"{format_bytes(best['peak_bytes'])} in place of {format_bytes(free)} ({format_percent(saved, 0)} less)"
    said += f", {100 * slowdown:+.1f} ± {100 * uncertainty:.1f} % of time"
    if saved >= _SLACK and uncertainty > _SCATTER:
        return Verdict(f"{said}: steps scatter too much here to tell", None)
    return Verdict(said, saved >= _SLACK and slowdown <= _SLACK + 2 * uncertainty)


def gradients_are_equal(figures: Figures) -> Verdict:
    """Checkpointed gradients against plain ones."""
    gradients = figures.get("gradients")
    if gradients is None:
        return Verdict("not measured", None)
    said = f"{gradients['parameters']} parameters, largest difference {gradients['largest_difference']:.2g}"
    return Verdict(said, gradients["equal"])


def checkpoints_save(figures: Figures) -> Verdict:
    """The peak of a checkpointed step against a plain one's."""
    plain, checkpointed = (figures[name]["peak_bytes"] for name in ("plain", "checkpointed"))
    saved = 1 - checkpointed / plain
    said = f"{format_bytes(checkpointed)} in place of {format_bytes(plain)} ({format_percent(saved, 0)} less)"
    return Verdict(said, saved > 0)


def checkpoints_cost_a_forward_pass(figures: Figures) -> Verdict:
    """The time of a checkpointed step against a plain one's."""
    plain, checkpointed = (figures[name]["seconds"] for name in ("plain", "checkpointed"))
    added = checkpointed / plain - 1
    said = f"{format_seconds(checkpointed)} in place of {format_seconds(plain)} ({100 * added:+.0f} %)"
    return Verdict(said, added <= _RECOMPUTING)


def trials_stay_within(figures: Figures) -> Verdict:
    """Peaks of trials against the budget."""
    budget, peaks = figures["budget_bytes"], [peak for peak in figures["trial_peaks_bytes"] if peak is not None]
    above = sum(peak > budget for peak in peaks)
    most = f"the highest {format_percent(max(peaks, default=0) / budget)} of {format_bytes(budget)}"
    return Verdict(f"{above} of {len(peaks)} above, {most}", not above)


def answer_trains_within(figures: Figures) -> Verdict:
    """The peak of training at the answer against the budget."""
    share = figures["trained_peak_bytes"] / figures["budget_bytes"]
    rows = f"{figures['batch_size']} rows, the floors say {figures['rows_by_floor']}"
    return Verdict(f"{format_percent(share)} of the budget at {rows}", share <= 1)


def search_is_short(figures: Figures) -> Verdict:
    """The time of a search in steps of its answer, first steps left out."""
    steps = figures["steps_of_the_answer"]
    return Verdict(f"{steps:.1f} steps, {len(figures['trial_peaks_bytes'])} sizes", steps <= _SEARCH_STEPS)


def packed_size(figures: Figures) -> Verdict:
    """Bytes of packed weights against bfloat16."""
    share = figures["formats"][_FOUR_BITS]["share_of_bfloat16"]
    return Verdict(f"{format_percent(1 - share)} smaller", abs(share - _FOUR_BITS_SHARE) < 0.001)


def one_row_is_faster(figures: Figures) -> Verdict:
    """The speed for one row."""
    return _faster(figures, most=False)


def many_rows_are_slower(figures: Figures) -> Verdict:
    """The speed for the largest number of rows."""
    verdict = _faster(figures, most=True)
    return Verdict(verdict.measured, None if verdict.holds is None else not verdict.holds)


def _faster(figures: Figures, *, most: bool) -> Verdict:
    """The comparison of 4 bits with bfloat16, with the other formats beside it."""
    said, holds = [], None
    for name, found in figures["formats"].items():
        rows = (max if most else min)(found["speed"], key=int)
        speed = found["speed"][rows]
        if speed["ratio"] is None:
            said.append(f"{name}: {speed['missing']}")
            continue
        said.append(f"{name}: {speed['ratio']:.2f}")
        if name == _FOUR_BITS:
            holds = speed["ratio"] >= 1
            said[-1] += f" times the speed at {rows} row{'' if rows == '1' else 's'}"
    return Verdict("; ".join(said), holds)


def kernels_are_right(figures: Figures) -> Verdict:
    """Faults of the kernels that were tried."""
    tried, faults = figures["tried"], figures["faults"]
    if not faults:
        return Verdict(f"{tried} of {tried}", True)
    return Verdict(f"{tried - len(faults)} of {tried}: {faults[0]}", False)


def wiring_gains_nothing(figures: Figures) -> Verdict:
    """The gain of wiring weights that leave memory free."""
    gain, uncertainty = figures["gain"], figures["uncertainty"]
    said = f"{100 * gain:+.1f} ± {200 * uncertainty:.1f} % in speed, {format_bytes(figures['bytes'])}"
    return Verdict(said, gain < _GAIN or gain < 2 * uncertainty)


def building_takes_no_memory(figures: Figures) -> Verdict:
    """Bytes that building a graph added, beside one of its arrays."""
    grown, operations = figures["grown_bytes_by_building"], figures["operations"]
    said = f"{format_bytes(grown)} for {operations} operations on {format_bytes(figures['array_bytes'])}"
    return Verdict(said, grown < 0.01 * figures["array_bytes"])


def evaluating_does_the_work(figures: Figures) -> Verdict:
    """The time of evaluating beside that of building."""
    built, evaluated = figures["built_seconds"], figures["evaluated_seconds"]
    return Verdict(f"built in {format_seconds(built)}, evaluated in {format_seconds(evaluated)}", evaluated > built)


def nobody_copies(figures: Figures) -> Verdict:
    """Bytes that were added while the processor and the GPU read one array."""
    grown, size = figures["grown_bytes"], figures["array_bytes"]
    said = f"{format_bytes(grown)} more for {format_bytes(size)}"
    if figures["readers"] == 1:
        return Verdict(f"{said}; one device, so there is nobody to share with", None)
    return Verdict(said, grown < size / 2)
