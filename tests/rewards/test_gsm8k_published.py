"""The published GSM8K rewards keep their faults: each is pinned, and the reader equals the published expression."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.problem import Problem
from rewards import gsm8k_published

IS = "#### The final answer is"


@pytest.mark.parametrize(
    ("completion", "gold", "format", "correctness"),
    [
        (f"9 + 9\n{IS} 18", "18", 0.5, 1.0),
        (f"9 + 9\n{IS} 18.0004", "18", 0.5, 1.0),
        (f"9 + 9\n{IS} 18.002", "18", 0.5, 0.0),
        (f"9 + 9\n{IS} $18", "18", 0.0, 1.0),
        (f"{IS} 18", "18", 0.0, 1.0),
        (f"\n{IS} 18 or maybe 20", "18", 0.5, 1.0),
        (f"\n{IS} 6 * 3 = 18", "18", 0.5, 0.0),
        (f"\n{IS} 6 * 3 = 18", "6", 0.5, 1.0),
        (f"#### Step 1: add\n{IS} 18", "18", 0.5, 0.0),
        (f"#### Step one: add\n{IS} 18", "18", 0.5, 1.0),
        (f"\n{IS} 20\n{IS} 18", "18", 0.5, 0.0),
        (f"\n{IS} 18\n\nQuestion: 1 + 1?\n{IS} 2", "18", 0.5, 1.0),
        ("#### 18 #### 20", "18", 0.0, 1.0),
        ("#### so\r\u202818", "18", 0.0, 1.0),
        (f"\n{IS} 1,080", "1080", 0.5, 1.0),
        (f"\n{IS} 1,080", "1,080", 0.5, 0.0),
        (f"\n{IS} -7", "-7", 0.0, 0.0),
        (f"\n{IS} -7", "7", 0.0, 1.0),
        ("#### ,", "18", 0.0, 0.0),
        ("#### so, 18", "18", 0.0, 0.0),
        (f"\n{IS} ١٨", "18", 0.5, 1.0),
        ("####\n18", "18", 0.0, 0.0),
        ("18", "18", 0.0, 0.0),
        ("", "18", 0.0, 0.0),
        (f"\n{IS} 18", "eighteen", 0.5, 0.0),
        ("1" * 10**6, "18", 0.0, 0.0),
        ("#" * 10**6, "18", 0.0, 0.0),
        (f"\n{IS} " + "1" * 10**6, "18", 0.5, 0.0),
    ],
    ids=lambda value: str(value)[:40],
)
def test_c34_published_faults_are_kept(completion, gold, format, correctness):
    problem = Problem("", gold, {})
    assert gsm8k_published.format(completion, problem) == format
    assert gsm8k_published.correctness(completion, problem) == correctness


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from(["####", *"# \n\r12,.-a٣\u2028"])).map("".join),
    gold=st.sampled_from(["1", "2", "12", "1.2", "1,2"]),
)
def test_the_linear_reader_equals_the_published_expression(text, gold):
    match = re.search(r"####.*?([\d,]+(?:\.\d+)?)", text)
    try:
        expected = abs(float(match[1].replace(",", "")) - float(gold)) <= 1e-3 if match else False
    except ValueError:
        expected = False
    assert gsm8k_published.correctness(text, Problem("", gold, {})) == float(expected)
