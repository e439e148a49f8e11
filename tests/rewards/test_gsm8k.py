"""The strict GSM8K rewards: a table of answer lines, properties of the parser, and every real gold solution."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import prompts
from data.problem import Problem
from rewards import gsm8k

IS = "#### The final answer is"


def grade(completion: str, gold: str) -> tuple[float, float]:
    problem = Problem("", gold, {})
    return gsm8k.format(completion, problem), gsm8k.correctness(completion, problem)


@pytest.mark.parametrize(
    ("completion", "gold", "format", "correctness"),
    [
        (f"{IS} 18", "18", 0.5, 1.0),
        (f" 9 + 9 = 18\n{IS} 18", "18", 0.5, 1.0),
        (f"one\n\ntwo\n{IS} 18\nand more 7", "18", 0.5, 1.0),
        (f"{IS} $18", "18", 0.5, 1.0),
        (f"{IS} 18%", "18", 0.5, 1.0),
        (f"{IS} 18 apples.", "18", 0.5, 1.0),
        (f"{IS} 18apples", "18", 0.5, 1.0),
        (f"{IS} 18.", "18", 0.5, 1.0),
        (f"{IS} 18.00", "18", 0.5, 1.0),
        (f"{IS} 18.0004", "18", 0.5, 1.0),
        (f"{IS} 18.002", "18", 0.5, 0.0),
        (f"{IS} -7", "7", 0.5, 0.0),
        (f"{IS} 0", "18", 0.5, 0.0),
        (f"{IS} 1,080", "1080", 0.5, 1.0),
        (f"{IS} 1,080", "1,080", 0.5, 1.0),
        (f"{IS} 1080", "1,080", 0.5, 1.0),
        (f"{IS} 1080", "$ 1,080", 0.5, 1.0),
        (f"{IS} -7", "-7", 0.5, 1.0),
        (f"{IS} +7", "7", 0.5, 1.0),
        (f"{IS} \N{MINUS SIGN}7", "-7", 0.5, 1.0),
        (f"{IS} \N{MINUS SIGN}7", "7", 0.5, 0.0),
        (f"{IS} 7", "\N{MINUS SIGN}7", 0.5, 0.0),
        (f"{IS} .5", "0.5", 0.5, 1.0),
        (f"{IS} .5", "5", 0.5, 0.0),
        (f"{IS} $.50", "50", 0.5, 0.0),
        (f"{IS} -.5", "5", 0.5, 0.0),
        (f"{IS} 5 or .5", "5", 0.0, 0.0),
        ("#### 18", "18", 0.0, 1.0),
        ("####18", "18", 0.0, 1.0),
        (f"{IS} **18**", "18", 0.0, 1.0),
        (f"{IS}: 18", "18", 0.0, 1.0),
        (f"{IS} 6 * 3 = 18", "18", 0.0, 0.0),
        (f"{IS} 18 or maybe 20", "18", 0.0, 0.0),
        (f"{IS} 1,08", "108", 0.0, 0.0),
        (f"{IS} 1e3", "1000", 0.0, 0.0),
        (f"{IS} 3/4", "0.75", 0.0, 0.0),
        (f"{IS} 1234567890123456", "1234567890123456", 0.0, 0.0),
        (f"#### Step 1: add\n9 + 9\n{IS} 18", "18", 0.5, 1.0),
        (f"{IS} 20\n{IS} 18", "18", 0.0, 1.0),
        (f"{IS} 18\n{IS} 20", "18", 0.0, 0.0),
        ("####\n18", "18", 0.0, 0.0),
        (f"{IS}\n18", "18", 0.0, 0.0),
        (f"{IS} ١٨", "18", 0.0, 0.0),
        ("", "18", 0.0, 0.0),
        ("18", "18", 0.0, 0.0),
        (f" {IS} 18", "18", 0.0, 0.0),
        (f"so {IS} 18", "18", 0.0, 0.0),
        (f"{IS}  18", "18", 0.0, 1.0),
        (f"{IS} 18 red apples", "18", 0.0, 1.0),
        (f"{IS} 18 Äpfel", "18", 0.0, 1.0),
        (f"{IS} 18 \t\r\nQuestion: 5", "18", 0.5, 1.0),
        (f"{IS} 18\x0b", "18", 0.0, 1.0),
        (f"{IS} 18\u2028{IS} 18", "18", 0.0, 0.0),
        (f"{IS} 18\r{IS} 18", "18", 0.0, 0.0),
    ],
)
def test_c34_answer_lines(completion, gold, format, correctness):
    assert grade(completion, gold) == (format, correctness)


# What a reader that drops commas, spaces and underscores makes of each gold: another number.
NOT_ONE_NUMBER = {"3,4": "34", "(3,4)": "34", "12,5": "125", "1, 2, 3": "123", "10 20": "1020", "1 080": "1080"}
NOT_ONE_NUMBER |= {"1_000": "1000", "1\N{NO-BREAK SPACE}080": "1080", "1,08": "108", "1080,": "1080"}
NOT_ONE_NUMBER |= {",5": "5", "1,080,5": "10805", "1234,567": "1234567", "1.5,000": "1.5", "\u0661\u0668": "18"}
NOT_ONE_NUMBER |= {"3-4": "34", "--7": "7", "$": "0"}


@pytest.mark.parametrize(("gold", "other"), NOT_ONE_NUMBER.items())
def test_c67_what_is_not_one_number_earns_nothing_as_a_gold_and_is_not_read_as_one(gold, other):
    """The kind: characters between digits are dropped, and a pair, a list or a decimal comma becomes another number.

    Siblings: spaces, underscores, no-break spaces, digits of other scripts, commas in groups that are not of three; in
    the gold, in the completion, in the majority (`statistics.py`) and in what the doctor writes (`check_graders.py`).
    """
    for said in (other, f"-{other}", gold):
        assert gsm8k.correctness(f"{IS} {said}", Problem("", gold, {})) == 0.0
        assert gsm8k.last_number(f"so {said}", Problem("", gold, {})) == 0.0
    assert gsm8k.one_number(gold) is None
    if any(digit in gold for digit in "123456789") and other not in gold:
        assert gsm8k.correctness(f"{IS} {gold}", Problem("", other, {})) == 0.0


GOLDS = {"1,080": "1080", "$1,080.50": "1080.5", "-1,000": "-1000", "-$7": "-7", "$-7": "-7", " 12 ": "12"}
GOLDS |= {"12.": "12", "$ 18": "18", ".5": "0.5", "1,234,567": "1234567", "\N{MINUS SIGN}7": "-7", "1e3": "1000"}


@pytest.mark.parametrize(("gold", "said"), GOLDS.items())
def test_c67_one_number_is_read_however_it_is_written(gold, said):
    assert gsm8k.correctness(f"{IS} {said}", Problem("", gold, {})) == 1.0


@pytest.mark.parametrize(
    ("said", "read"),
    [("-$7", "-7"), ("$-7", "-7"), ("1234567890123456", None), ("3,4", None), ("1,23", None)]
    + [("1,2345", None), ("(5, 6)", "6"), ("18, or so", "18"), ("$1,080.50.", "1,080.50")],
)
def test_c67_a_piece_of_digits_is_read_whole_or_not_at_all(said, read):
    """The kind, in completions: a piece of what is written is paid for another gold."""
    assert gsm8k.final_number(f"7 apples, so {said}") == read
    for gold in ("7", "23", "4", "5", "6", "2345"):
        assert gsm8k.last_number(f"so {said}", Problem("", gold, {})) == float(read == gold)
    assert read is None or gsm8k.last_number(f"so {said}", Problem("", read, {})) == 1.0


@pytest.mark.parametrize("gold", ["", "a dozen", "nan", "3/4", "18%", "inf"])
def test_c34_a_gold_that_is_no_number_is_never_matched(gold):
    assert gsm8k.correctness(f"{IS} 18", Problem("", gold, {})) == 0.0


@pytest.mark.parametrize(
    ("completion", "gold", "value"),
    [
        ("so 18", "18", 1.0),
        ("she has 18 apples.", "18", 1.0),
        ("6 * 3 = 18\n#### The final answer is $1,080.00", "1,080", 1.0),
        ("18, or maybe 20", "18", 0.0),
        ("####\n-7", "-7", 1.0),
        ("eighteen", "18", 0.0),
        ("", "18", 0.0),
        ("18", "eighteen", 0.0),
    ],
)
def test_the_last_number_is_read_wherever_it_stands(completion, gold, value):
    assert gsm8k.last_number(completion, Problem("", gold, {})) == value


MEGABYTE = 10**6


@pytest.mark.parametrize(
    "text",
    [
        "1" * MEGABYTE,
        f"{IS} " + "1" * MEGABYTE,
        f"{IS} 1" + ",234" * (MEGABYTE // 4) + "!",
        f"{IS} 1." + "2" * MEGABYTE + "!",
        f"{IS} 1 " + "a" * MEGABYTE + "!",
        f"{IS} 1" + " \t" * MEGABYTE + "!",
        "#" * MEGABYTE,
        "####\n" * (MEGABYTE // 5),
    ],
    ids=lambda text: text[:30].strip(),
)
def test_c34_a_megabyte_is_graded_in_linear_time(text):
    # Quadratic time on a million characters is hours, so that a failure shows as a test that does not end.
    assert grade(text, "18") == (0.0, 0.0)


@settings(deadline=None)
@given(text=st.text(alphabet=st.one_of(st.sampled_from(" #\n\r\t$%.,+-0123456789"), st.characters())), gold=st.text())
def test_any_text_is_graded(text, gold):
    format, correctness = grade(f"{IS} {text}", gold)
    assert format in (0.0, 0.5)
    assert correctness in (0.0, 1.0)


@settings(deadline=None)
@given(number=st.integers(-(10**14), 10**14), unit=st.sampled_from(["", ".", "%", " apples", "dollars."]))
def test_c34_commas_and_units_round_trip(number, unit):
    assert grade(f"{IS} {number:,}{unit}", str(number)) == (0.5, 1.0)
    assert grade(f"{IS} {number}{unit}", f"{number:,}") == (0.5, 1.0)
    assert grade(f"{IS} {number:,}{unit}", str(number + 1)) == (0.5, 0.0)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.skipif("GRPO_TEST_DATA" not in os.environ, reason="GRPO_TEST_DATA names no folder of real data")
def test_c34_every_gold_solution_of_gsm8k_gets_full_marks(split):
    problems = data.load("gsm8k", split, path=os.path.join(os.environ["GRPO_TEST_DATA"], "gsm8k"))
    graded = [(gsm8k.format(text, p), gsm8k.correctness(text, p)) for p in problems if (text := gold_completion(p))]
    assert len(graded) == {"train": 6973, "validation": 500, "test": 1319}[split]
    exceptions = [problem.prompt for problem, marks in zip(problems, graded, strict=True) if marks != (0.5, 1.0)]
    assert len(exceptions) == 0, exceptions


def gold_completion(problem: Problem) -> str:
    return " " + prompts.worked_answer({"solution": problem.info["solution"], "answer": problem.answer})
