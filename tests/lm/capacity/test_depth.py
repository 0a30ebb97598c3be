from __future__ import annotations

import pytest

from mlx_tune.lm.capacity.depth import START, Course, DeepCourse, Depths

DEPTHS = Depths(low=(2, 4), high=(2, 8), deep=(10, 20), still_bytes=(7, 1000))


def at(still: int, trained: int, rows: int, length: int = 1) -> Course:
    """A step whose memory is a straight line in everything."""
    base = 7 * still + 50 * trained
    return Course({START: base, "loss": base + 3 * trained * rows + 11 * rows * length, "update": base + 9})


def test_a_deep_course_is_read_off_two_short_ones():
    traced = []

    def trace(repeats, rows, length):
        traced.append(tuple(repeats))
        return at(*repeats, rows, length)

    course = DeepCourse(DEPTHS, trace, 1, 1)
    assert course.extrapolated
    assert traced[0] == (10, 20)
    for rows in (1, 5):
        assert course(rows, 3).highest == at(10, 20, rows, 3).highest
    before = len(traced)
    course(5, 3)
    assert len(traced) == before


def test_blocks_that_are_not_trained_are_added_from_one_short_model():
    depths = Depths(low=(2, 4), high=(2, 4), deep=(10, 4), still_bytes=(7, 1000))
    traced = []

    def trace(repeats, rows, length):
        traced.append(tuple(repeats))
        return at(*repeats, rows, length)

    course = DeepCourse(depths, trace, 1, 1)
    assert course(5, 1).highest == at(10, 4, 5).highest
    assert (course.extrapolated, set(traced)) == (False, {(2, 4)})


def test_what_is_read_is_scaled_by_what_the_deep_model_shows():
    def trace(repeats, rows, length):
        course = at(*repeats, rows, length)
        if repeats == DEPTHS.deep:  # another order of evaluation: a tenth more than the line
            start = course.start_bytes
            return Course({key: start + round(1.1 * (n - start)) for key, n in course.highest.items()})
        return course

    course = DeepCourse(DEPTHS, trace, 4, 1)
    assert course(4, 1).peak_bytes == trace(DEPTHS.deep, 4, 1).peak_bytes
    assert course(9, 1).peak_bytes == pytest.approx(trace(DEPTHS.deep, 9, 1).peak_bytes, rel=0.001)


def test_models_that_run_other_operations_are_joined_by_their_peaks():
    low, high = Course({START: 10, "a": 20}), Course({START: 20, "b": 40})
    deep = Depths((4,), (8,), (12,), (0,)).extended(low, high)
    assert (deep.start_bytes, deep.peak_bytes, deep.floor.bytes) == (30, 60, 60)
