"""The form of reasoning and answer, and that rewards see the answer alone if they are told where reasoning ends."""

import pytest

from data.problem import Problem
from rewards import after_reasoning
from rewards.runner import RewardRunner
from rewards.think import format

PROBLEM = Problem("", "18", {})
GOOD = "<think>\n6 * 3 = 17? No.\n</think>\n<answer>18</answer>"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1),
        (f"\n {GOOD} \n", 1),
        (GOOD.replace("</think>\n", "</think>"), 1),
        (GOOD + " So it is 18.", 0),
        ("Well. " + GOOD, 0),
        (GOOD.replace("<think>", ""), 0),
        (GOOD.replace("<answer>18", "<answer> "), 0),
        (GOOD.replace("\n6 * 3 = 17? No.\n", " "), 0),
        (GOOD + GOOD, 0),
        (GOOD.replace("No.", "</think><think>No."), 0),
        ("<answer>18</answer><think>x</think>", 0),
        ("", 0),
    ],
)
def test_the_form(text, value):
    assert format("whatever the answer is", PROBLEM, whole=text) == value


@pytest.mark.parametrize(
    ("text", "end", "rest"),
    [
        ("a </think> b", "</think>", " b"),
        ("a </think> b </think> c", "</think>", " c"),
        ("still thinking", "</think>", "still thinking"),
        ("done</think>", "</think>", ""),
        ("a </think> b", None, "a </think> b"),
    ],
)
def test_what_stands_behind_the_reasoning(text, end, rest):
    assert after_reasoning(text, end) == rest


def test_a_reward_reads_the_answer_and_may_ask_for_the_whole_text():
    texts = [GOOD, "<think>18</think> I do not know."]
    for end, numbers in (("</think>", [1.0, 0.0]), (None, [1.0, 1.0])):
        with RewardRunner(["gsm8k.last_number", "think.format"], timeout=5, reasoning_end=end) as runner:
            assert runner.score(texts, [PROBLEM] * 2) == [numbers, [1.0, 0.0]]
