"""Bytes, shares and times to text and back."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune.errors import InvalidArgumentError, QuantizationError
from mlx_tune.units import (
    format_bytes,
    format_percent,
    format_seconds,
    number,
    parse_bytes,
    parse_fraction,
    whole_number,
)


@pytest.mark.parametrize(
    ("given_size", "expected"),
    [
        ("8G", 8 * 10**9),
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("8Gi", 8 * 2**30),
        ("512 MB", 512 * 10**6),
        ("1.5kB", 1500),
        (".5M", 500_000),
        ("12", 12),
        ("12 B", 12),
        ("1_000_000", 10**6),
        ("2e3", 2000),
        ("+3TB", 3 * 10**12),
        ("9007199254740993", 9007199254740993),  # more than a float can hold
        (" 1PB ", 10**15),
        (0, 0),
        (123, 123),
        (2e9, 2 * 10**9),
        (np.int64(77), 77),
    ],
)
def test_parse_bytes_reads(given_size, expected):
    assert parse_bytes(given_size) == expected
    assert type(parse_bytes(given_size)) is int


@pytest.mark.parametrize(
    "bad", ["", "GB", "eight GB", "8XB", "8 G B", "1iB", "--1", "8GB!", "nan", "NaN GB", "inf", None, [], object, True]
)
def test_parse_bytes_refuses_nonsense_and_repeats_it(bad):
    with pytest.raises(InvalidArgumentError) as caught:
        parse_bytes(bad)
    assert repr(bad) in str(caught.value)
    assert "8GiB" in str(caught.value), "the text says what would be accepted"


@pytest.mark.parametrize("bad", ["-1", "-8GB", "- 8 GiB", -1, -2.0])
def test_parse_bytes_refuses_negatives(bad):
    with pytest.raises(InvalidArgumentError, match="negative") as caught:
        parse_bytes(bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1e999GB"])
def test_parse_bytes_refuses_what_is_not_finite(bad):
    with pytest.raises(InvalidArgumentError, match="finite") as caught:
        parse_bytes(bad)
    assert repr(bad) in str(caught.value)


def test_parse_bytes_refuses_part_of_a_byte():
    with pytest.raises(InvalidArgumentError, match=r"0\.5 is not a whole number"):
        parse_bytes(0.5)


@given(st.integers(min_value=0, max_value=10**18))
def test_a_formatted_size_reads_back_within_half_a_per_cent(n):
    assert abs(parse_bytes(format_bytes(n)) - n) <= 0.005 * n
    assert format_bytes(-n) == ("-" if n else "") + format_bytes(n)


@given(st.integers(min_value=0, max_value=10**18))
def test_whole_numbers_read_back_exactly(n):
    assert parse_bytes(str(n)) == parse_bytes(n) == n


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (12_345, "12.3 kB")],
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text


@pytest.mark.parametrize(("value", "share"), [("20%", 0.2), (0.9, 0.9), ("0.5", 0.5), (" 100 % ", 1.0), (0, 0.0)])
def test_parse_fraction_reads(value, share):
    assert parse_fraction(value) == pytest.approx(share)


@pytest.mark.parametrize("bad", [-0.1, 1.1, "120%", "many", None, True, math.nan])
def test_parse_fraction_refuses(bad):
    with pytest.raises(InvalidArgumentError) as caught:
        parse_fraction(bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 µs"),
        (1.5e-6, "1.50 µs"),
        (0.9999, "1.00 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min 0 s"),
        (3600, "1 h 0 min"),
        (-2, "-2.00 s"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_format_percent():
    assert format_percent(0.5) == "50.0 %"
    assert format_percent(0.12345, digits=2) == "12.35 %"


@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4), np.array(4)], ids=lambda value: type(value).__name__)
def test_whole_numbers_of_numpy_are_numbers(value):
    assert whole_number(value, "bits") == 4
    assert type(whole_number(value, "bits", least=4)) is int


@pytest.mark.parametrize("value", [4.0, np.float32(4), True, np.bool_(True), "4", None, [4]], ids=repr)
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(QuantizationError, match=r"^bits=.* must be a whole number\.$"):
        whole_number(value, "bits", error=QuantizationError)


def test_a_whole_number_that_is_too_small_is_named():
    with pytest.raises(InvalidArgumentError, match=r"batch_size=0: give a whole number of at least 1\."):
        whole_number(0, "batch_size", least=1)


def test_number() -> None:
    assert number(mx.array(True)) == 1.0
    assert number(mx.array(2.5, dtype=mx.bfloat16)) == 2.5
