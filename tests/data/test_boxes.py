r"""Boxes in a text: nested braces, escapes, boxes that are not closed, and linear time."""

import pytest

from data.boxes import boxes, last_box

LAST = {
    r"\boxed{4}": "4",
    r"so $\boxed{\frac{1}{2}}$.": r"\frac{1}{2}",
    r"\boxed{1} and \boxed{2}": "2",
    r"\boxed{1} and \boxed{2": None,
    r"\boxed{a \boxed{b} c}": r"a \boxed{b} c",
    r"\boxed{a \boxed{b}": "b",
    r"\fbox{7}": "7",
    r"\boxed {7}": "7",
    r"\boxed{ 7 }": "7",
    r"\boxed{\{1, 2\}}": r"\{1, 2\}",
    r"\boxed{\{1}": r"\{1",
    r"\boxed{1\}": None,
    r"\boxed{1\\}": r"1\\",
    r"} \boxed{1}": "1",
    r"{ \boxed{1}": "1",
    r"\\boxed{1}": None,
    r"\boxed 7": None,
    r"\boxed{}": "",
    "boxed{7}": None,
    "": None,
}


@pytest.mark.parametrize(("text", "inside"), LAST.items())
def test_the_last_box(text, inside):
    assert last_box(text) == inside


def test_boxes_are_counted_without_those_inside_of_others():
    assert boxes(r"\boxed{1}, \boxed{\boxed{2}} and \boxed{3") == [
        (0, 9, "1"),
        (11, 28, r"\boxed{2}"),
        (33, 41, None),
    ]


@pytest.mark.parametrize("text", [r"\boxed{", "{", "}", "\\", r"\boxed{}", r"{\boxed{1}", r"\boxed{{", r"}\boxed{1}"])
def test_a_megabyte_is_read_in_linear_time(text):
    # Quadratic time on a million characters is hours, so that a failure shows as a test that does not end.
    last_box(text * (10**6 // len(text)))
