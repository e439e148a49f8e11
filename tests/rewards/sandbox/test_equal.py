"""When answers are equal: nothing but the same numbers and words, in the same order."""

import math

import pytest

from rewards.sandbox.equal import equal_texts, equal_values
from rewards.sandbox.wire import Opaque


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("1 2\n3\n", "1 2\n3"),
        ("  1   2  \n3", "1 2\n3"),
        ("a\r\nb", "a\nb"),
        ("1.0", "1"),
        ("1e3", "1000.00"),
        ("-0", "0"),
        ("YES", "YES\n"),
        ("", "\n"),
        ("9" * 5000 + ".0", "9" * 5000),
    ],
)
def test_texts_that_are_equal(printed, expected):
    assert equal_texts(printed.encode(), expected)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("1", "1 2"), ("1 2 3", "1 2"), ("2 1", "1 2"), ("1\n2", "1 2"), ("1 2\n", "1 2\n3"), ("1\n\n2", "1\n2"),
        ("yes", "YES"), ("nan", "NaN"), ("inf", "Infinity"), ("1_0", "10"), ("0x1", "1"), ("True", "1"),
        ("1.0000001", "1"), ("", "0"), ("1,2", "1 2"), ("1e999999999999", "1e999999999998"), ("\u0661", "1"),
        ("1e999999999", "1"),
    ],
)  # fmt: skip
def test_texts_that_are_not(printed, expected):
    assert not equal_texts(printed.encode(), expected)


def test_what_is_no_utf8_equals_nothing():
    assert not equal_texts(b"\xff", "\ufffd")


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        (1, 1), (True, True), (None, None), ((1, 2), [1, 2]), ([(1,)], [[1]]), (0.1 + 0.2, 0.3), (3, 3.0), (3.0, 3),
        ({"a": (1,)}, {"a": [1]}), ("a", "a"), (math.inf, math.inf), (10**400, 10**400), (1e-7, 0.0),
    ],
)  # fmt: skip
def test_values_that_are_equal(mine, expected):
    assert equal_values(mine, expected)


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        (1, True), (True, 1), (0, False), (1.0, True), (1, math.inf), (math.nan, math.nan), (10**400, 1.5), ("1", 1),
        ([1], [1, 2]), ([1, 2], [2, 1]), ({1}, [1]), ({"a": 1}, {"a": 1, "b": 2}), ({"a": 1, "b": 2}, {"a": 1}),
        (1.0000001, 1), (1.001, 1.0), (None, 0), (Opaque("x"), None), (Opaque("x"), 1), ([Opaque("x")], [1]), ("", []),
        (-math.inf, math.inf), (math.inf, 1e308),
    ],
)  # fmt: skip
def test_values_that_are_not(mine, expected):
    assert not equal_values(mine, expected)


def test_a_megabyte_of_digits_is_compared_in_linear_time():
    # Quadratic time is hours here, so that a failure shows as a test that does not end.
    assert not equal_texts(b"1" * 2**20 + b"x", "1") and equal_texts(b"1" * 2**20 + b".", "1" * 2**20)
