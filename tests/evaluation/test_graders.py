"""The six graders on a table of hard cases, and the two of lm-evaluation-harness against a reading of its own files."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.problem import Problem
from grpo.evaluation.graders import GRADERS
from rewards import gsm8k, gsm8k_published

MEGABYTE = 10**6
PROMPT = "Question: 6 boxes of 3?\nSolution: Let's think step by step."
NAMES = ("marker", "marker_first", "last_number", "published", "lm_eval_strict", "lm_eval_flexible")
NEXT = "\n\nQuestion: 5 and 2?\nSolution: 5 + 2 = 7\n#### The final answer is 7"

# (prompt, completion, gold), then what each grader of NAMES reads; a value is right if it stands in `right`.
TABLE = [
    ("nothing", PROMPT, "", "18", [None, None, None, "3", None, None], ""),
    ("the prompt's last number is the gold", PROMPT, "", "3", [None, None, None, "3", None, None], "3"),
    ("the marker, bare", PROMPT, "\n#### 18", "18", ["18", "18", "18", "18", "18", "18"], "18"),
    ("the marker, in words", PROMPT, "\n#### The final answer is 18", "18", ["18", "18", "18", "18", None, "18"], "18"),
    ("the marker without a space", PROMPT, "\n####18", "18", ["18", "18", "18", "18", None, "18"], "18"),
    ("the marker in a line", PROMPT, " so #### 18", "18", [None, "18", "18", "18", "18", "18"], "18"),
    ("no marker", PROMPT, " 6 * 3 = 18", "18", [None, None, "18", "18", None, "18"], "18"),
    ("a period", PROMPT, "\n#### 18.", "18", ["18", "18", "18", "18", "18.", "18."], "18 18."),
    ("two periods", PROMPT, "\n#### 18..", "18", ["18", "18", "18", "18", "18..", "18.."], "18"),
    ("an ellipsis after the number", PROMPT, " It is 18 ...", "18", [None, None, "18", "18", None, "..."], "18"),
    ("a comma after the number", PROMPT, " 18, I think", "18", [None, None, "18", "18", None, "18,"], "18 18,"),
    ("one digit", PROMPT, "\n#### 8", "8", ["8", "8", "8", "8", "8", "8"], "8"),
    ("dollars", PROMPT, "\n#### $18", "18", ["18", "18", "18", "18", None, "$18"], "18 $18"),
    ("a dollar after the sign", PROMPT, " -$18", "-18", [None, None, "-18", "18", None, "-$18"], "-$18 -18"),
    ("per cent", PROMPT, "\n#### 18%", "18", ["18", "18", "18", "18", "18", "18"], "18"),
    ("zero decimals", PROMPT, "\n#### 18.00", "18", ["18.00", "18.00", "18.00", "00", "18.00", "18.00"], "*marker"),
    ("decimals", PROMPT, "\n#### 2.5", "2.5", ["2.5", "2.5", "2.5", "5", "2.5", "2.5"], "2.5"),
    ("a fraction", PROMPT, "\n#### 3/4", "4", [None, "3", "4", "4", "3", "4"], "4"),
    ("comma in both", PROMPT, "\n#### 1,080", "1,080", ["1,080", "1,080", "1,080", "080", "1,080", "1,080"], "*comma"),
    ("comma in answer", PROMPT, "\n#### 1,080", "1080", ["1,080", "1,080", "1,080", "080", "1,080", "1,080"], "1,080"),
    ("comma in gold", PROMPT, "\n#### 1080", "1,080", ["1080", "1080", "1080", "1080", "1080", "1080"], "*comma"),
    ("minus in both", PROMPT, "\n#### -7", "-7", ["-7", "7", "-7", "7", "-7", "-7"], "-7"),
    ("minus in the answer", PROMPT, "\n#### -7", "7", ["-7", "7", "-7", "7", "-7", "-7"], "7"),
    ("minus in the gold", PROMPT, "\n#### 7", "-7", ["7", "7", "7", "7", "7", "7"], ""),
    ("plus", PROMPT, "\n#### +7", "7", ["+7", "7", "+7", "7", None, "7"], "+7 7"),
    ("a term before it", PROMPT, "\n#### 6 * 3 = 18", "18", [None, "6", "18", "18", "6", "18"], "18"),
    ("a second thought", PROMPT, "\n#### 18 or 20", "18", [None, "18", "20", "20", "18", "20"], "18"),
    ("a step with a marker", PROMPT, "\n#### 1 Add\n#### 18", "18", ["18", "1", "18", "18", "1", "18"], "18"),
    ("two answers, the first right", PROMPT, "\n#### 18\n#### 20", "18", ["20", "18", "20", "20", "18", "20"], "18"),
    ("words after it", PROMPT, "\n#### 18\nThat was 1 of 2.", "18", ["18", "18", "2", "2", "18", "2."], "18"),
    ("run-on", PROMPT, "\n#### 18" + NEXT, "18", ["7", "18", "7", "7", "18", "7"], "18"),
    ("run-on that is right by luck", PROMPT, "\n#### 18" + NEXT, "7", ["7", "18", "7", "7", "18", "7"], "7"),
    ("marker and number apart", PROMPT, "\n####\n18", "18", [None, None, "18", "18", None, "18"], "18"),
    ("two spaces", PROMPT, "\n####  18", "18", ["18", "18", "18", "18", None, "18"], "18"),
    ("digits that join the prompt's", "1 + 8 = 1", "8", "18", [None, None, "8", "18", None, "8"], "18"),
    ("digits of another script", PROMPT, " ١٨", "18", [None, None, None, "١٨", None, None], ""),
    ("a number in letters", PROMPT, "\n#### eighteen", "18", [None, None, None, "3", None, None], ""),
]  # fmt: skip
SPECIAL = {
    "*marker": {"marker", "marker_first", "last_number"},  # compare values, the others text
    "*comma": {"marker", "last_number", "lm_eval_strict", "lm_eval_flexible"},  # drop the comma of the gold
}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[0])
def test_hard_cases(case):
    _, prompt, completion, gold, values, right = case
    problem = Problem(prompt, gold, {})
    expected = {
        name: (value, name in SPECIAL[right] if right in SPECIAL else value in right.split())
        for name, value in zip(NAMES, values, strict=True)
    }
    assert {name: GRADERS[name](completion, problem) for name in NAMES} == expected


def test_the_table_is_of_all_graders_and_each_is_right_and_wrong_in_it():
    assert tuple(GRADERS) == (*NAMES, "hendrycks", "minerva")  # those of `test_graders_math.py`
    for name in NAMES:
        verdicts = {
            GRADERS[name](completion, Problem(prompt, gold, {}))[1] for _, prompt, completion, gold, *_ in TABLE
        }
        assert verdicts == {True, False}, name


def test_no_two_graders_agree_on_the_whole_table():
    verdicts = {name: [GRADERS[name](c[2], Problem(c[1], c[3], {}))[1] for c in TABLE] for name in NAMES}
    assert len({tuple(row) for row in verdicts.values()}) == len(NAMES)


def harness(completion: str, gold: str, *, pattern: str, group_select: int) -> tuple[str, bool]:
    """The steps of lm-evaluation-harness, as its `filters/extraction.py`, `api/metrics.py` and gsm8k.yaml have them.

    The reference is the whole solution, from which `(?s).*#### ` leaves the gold; each expression is applied to both
    sides, one after the other.
    """
    found = re.compile(pattern).findall(completion)
    value = "[invalid]"
    if found:
        value = found[group_select]
        if isinstance(value, tuple):
            value = [group for group in value if group][0]
        value = value.strip()
    prediction, reference = value, f"He pays $3 for 6, 1,000 times.\n#### {gold}"
    for expression in (",", "\\$", "(?s).*#### ", "\\.$"):
        prediction, reference = re.sub(expression, "", prediction), re.sub(expression, "", reference)
    return value, prediction.lower() == reference.lower()


HARNESS = {
    "lm_eval_strict": {"pattern": "#### (\\-?[0-9\\.\\,]+)", "group_select": 0},
    "lm_eval_flexible": {"pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
}
PIECES = [
    *("#### ", "####", "-", "$", ",", ".", "..", " ", "\n", "%", "7", "18", "1,080", "18.00", "$18."),
    *("\n\nQuestion:", "#### 18", "#### -", "#### .", "18,", "[invalid]", "-7", "0", "x", "١٨"),
]  # fmt: skip


@pytest.mark.parametrize("grader", HARNESS)
@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8), gold=st.sampled_from(["18", "-7", "7", "1,080", "18.00"]))
def test_lm_eval_is_the_harness(grader, pieces, gold):
    for completion, answer in [("".join(pieces), gold), *((case[2], case[3]) for case in TABLE)]:
        value, right = harness(completion, answer, **HARNESS[grader])
        expected = (None if value == "[invalid]" else value, right)
        assert GRADERS[grader](completion, Problem(PROMPT, answer, {})) == expected, completion


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8), gold=st.sampled_from(["18", "-7", "1,080", "?"]))
def test_marker_and_last_number_are_the_rewards(pieces, gold):
    text, problem = "".join(pieces), Problem(PROMPT, gold, {})
    for name, reward in (
        ("marker", gsm8k.correctness),
        ("marker_first", gsm8k_published.correctness),
        ("last_number", gsm8k.last_number),
    ):
        value, right = GRADERS[name](text, problem)
        assert right == (reward(text, problem) > 0)
        # What was read is what was graded: with it as the gold, the same text is right (unless no gold has that form).
        if value is not None and name != "marker_first":
            assert reward(text, Problem(PROMPT, value, {})) > 0
        assert value is not None or not right


@pytest.mark.parametrize(
    "text",
    ["1", "#", "#### ", "####\n", "#### 1\n", "1,", "111,", "-", "$", ".", "1.", "#### -", "####$", "\n"],
)
@pytest.mark.parametrize("grader", NAMES)
def test_a_megabyte_is_graded_in_linear_time(grader, text):
    # Quadratic time on a million characters is hours, so that a failure shows as a test that does not end.
    value, right = GRADERS[grader](text * (MEGABYTE // len(text)) + "!", Problem(PROMPT, "18", {}))
    assert not right
    assert value is None or len(value) <= MEGABYTE
