"""What graders make of known answers: golds out of reach, and where two of them part."""

import os
from pathlib import Path

import pytest

import data
from data.problem import Problem
from data.prompts import STOP
from grpo.doctor.check_data import out_of_reach
from grpo.doctor.probes import examine, writings, wrong_answer
from rewards import gsm8k
from rewards.runner import RewardRunner
from tests.fakes.known_facts import config, facts
from tests.fakes.runs import PATIENCE

OURS, PUBLISHED = "gsm8k.correctness", "gsm8k_published.correctness"


def problem(answer: str, **info) -> Problem:
    return Problem("Q", answer, {"question": "Q", "solution": "1 + 1 = 2", "shots": [], "stop": STOP} | info)


def test_a_gold_with_a_comma_is_out_of_reach_of_the_published_reward():
    problems = [problem("18"), problem("1,080"), problem("-7")]
    graders, _ = examine((PUBLISHED, OURS), (), problems, timeout=PATIENCE)
    assert {grader.name: grader.never for grader in graders} == {PUBLISHED: ("1,080", "-7"), OURS: ()}
    assert all(grader.graded == 3 for grader in graders)


def test_who_reads_answers_and_who_only_looks_at_the_form():
    graders, _ = examine(("gsm8k.format", OURS), (), [problem("18"), problem("20")], timeout=PATIENCE)
    assert {grader.name: grader.reads_answers for grader in graders} == {"gsm8k.format": False, OURS: True}


def test_where_training_and_evaluation_part():
    problems = [problem("18"), problem("20"), problem("1,080")]
    _, apart = examine((PUBLISHED,), (OURS, "gsm8k.format"), problems, timeout=PATIENCE)
    cases = {case.writing: case for case in apart}
    two_lines = cases["an answer line with a wrong number, then the right one"]
    assert (two_lines.count, two_lines.probed, two_lines.earned) == (3, 3, False)
    assert two_lines.text == "#### The final answer is 19\n#### The final answer is 18"
    assert (cases["the answer line alone"].count, cases["the answer line alone"].answer) == (1, "1,080")


def test_a_sign_that_is_not_read_shows():
    _, apart = examine((OURS,), (PUBLISHED,), [problem("-7")], timeout=PATIENCE)
    assert ("the worked solution", True) in [(case.writing, case.earned) for case in apart]


def test_equal_graders_never_part():
    assert examine((OURS,), (OURS, "gsm8k.format"), [problem("1,080"), problem("-7")], timeout=PATIENCE)[1] == ()


def test_a_reward_that_only_looks_at_the_form_is_not_compared():
    assert examine(("gsm8k.format",), (OURS,), [problem("18")], timeout=PATIENCE)[1] == ()


@pytest.mark.parametrize("broken_on", ["some", "all"])
def test_a_reward_that_fails_on_every_text_shows_with_its_reason(monkeypatch, broken_on):
    score = RewardRunner.score

    def fail(runner, completions, problems):
        format_values, values = score(runner, completions, problems)
        runner.first_errors[OURS] = "it broke"
        return [format_values, [None if broken_on == "all" or "19" in text else 1.0 for text in completions]]

    monkeypatch.setattr(RewardRunner, "score", fail)
    graders, _ = examine(("gsm8k.format", OURS), (), [problem("18"), problem("19")], timeout=PATIENCE)
    assert [grader.fails for grader in graders] == ["", "it broke" if broken_on == "all" else ""]


def test_ways_to_write_a_right_answer_are_right_but_where_they_say_so():
    for answer in ("18", "1,080", "1080", "-7"):
        for writing, text in writings(problem(answer)).items():
            right = gsm8k.correctness(text, problem(answer)) == 1.0
            odd = writing in ("no #### before the answer", "an equation on the answer line")
            assert right == (not odd and "wrong answer" not in writing), (answer, writing)


def test_running_on_is_tried_where_nothing_stops_it():
    assert not any("another question" in writing for writing in writings(problem("18")))
    run_on = writings(problem("18", stop=[]))["right, then another question is asked and answered"]
    assert run_on.endswith("Question: What else?\n#### The final answer is 19")


@pytest.mark.parametrize("gold", ["3,4,5,6", "1000,2", "1_000", "\N{SUPERSCRIPT TWO}000", "1080"])
def test_c67_no_other_number_is_taken_for_a_right_answer(gold):
    """The kind is that of tests/rewards/test_gsm8k.py: a list of numbers is not one number without its commas."""
    texts = writings(problem(gold))
    assert ("the thousands comma written otherwise than in the data" in texts) == (gold == "1080")


def test_c67_the_doctor_names_golds_that_are_not_one_number():
    golds = ("3,4", "18", "12,5", "1_000")
    ((grader,), _) = examine((OURS,), (), [problem(gold) for gold in golds], timeout=PATIENCE)
    assert grader.never == ("3,4", "12,5", "1_000")
    (finding,) = out_of_reach(config(rewards=(OURS,), reward_weights=(1.0,)), facts(graders=(grader,)))
    assert "75.00% of the gold answers (3 of 4: '3,4', '12,5', '1_000')" in finding.what
    assert finding.do.startswith("Write each gold as one number")


PARTS = {"#### The final answer is 18": 0.5, "#### The final answer is 19": 0.05}


@pytest.mark.parametrize(("threshold", "full", "never"), [(None, 1.0, 1), (0.5, 1.0, 0), (None, 0.5, 0)])
def test_c71_a_judge_that_gives_a_part_only_is_out_of_reach(monkeypatch, threshold, full, never):
    """The kind is that of tests/evaluation/test_grading.py: what is too little to count is out of reach."""
    monkeypatch.setattr(
        RewardRunner,
        "score",
        lambda runner, texts, problems: [[PARTS.get(text, 0.0) for text in texts]] * len(runner.names),
    )
    monkeypatch.setattr(gsm8k.correctness, "full_value", full, raising=False)
    judge = problem("18", solution="no")
    graders, apart = examine((OURS,), (OURS,), [judge], timeout=PATIENCE, threshold=threshold)
    assert [len(grader.never) for grader in graders] == [never]
    assert (graders[0].needed, graders[0].highest) == (threshold or full, 0.5)
    found = list(out_of_reach(config(rewards=(OURS,), reward_weights=(1.0,)), facts(graders=graders)))
    assert len(found) == never
    for finding in found:
        assert "gsm8k.correctness grants less than 1 to 100.00% of the gold answers" in finding.what
        assert finding.do.endswith("beside the function: correctness.full_value = 0.5, or --eval_threshold.")
    assert not never or {case.earned for case in apart} == {True}  # training pays in full for what is not right


def test_c71_where_both_pay_in_full_partial_credit_makes_no_disagreement(monkeypatch):
    parts = {"#### The final answer is 18": 1.0, "#### The final answer is 19": 0.05}
    monkeypatch.setattr(
        RewardRunner, "score", lambda runner, texts, problems: [
            [parts.get(text, 0.05) for text in texts], [float(parts.get(text, 0.0) == 1.0) for text in texts]
        ],
    )  # fmt: skip
    assert examine((PUBLISHED,), (OURS,), [problem("18", solution="no")], timeout=PATIENCE)[1] == ()


@pytest.mark.parametrize(("gold", "wrong"), [("18", "19"), ("1,080", "1081"), ("-7", "-6"), ("x", "12345")])
def test_a_wrong_answer_is_another_number(gold, wrong):
    assert wrong_answer(gold) == wrong


@pytest.mark.skipif("GRPO_TEST_DATA" not in os.environ, reason="needs GRPO_TEST_DATA, a directory with gsm8k/")
def test_every_gold_of_gsm8k_is_within_reach_of_our_reward():
    path = str(Path(os.environ["GRPO_TEST_DATA"]) / "gsm8k")
    problems = data.load("gsm8k", "test", path=path)
    graders, _ = examine((OURS, "gsm8k.format", PUBLISHED), (), problems, timeout=PATIENCE)
    assert [len(grader.never) for grader in graders[:2]] == [0, 0]
    assert all("," in answer or "-" in answer for answer in graders[2].never) and len(graders[2].never) > 5
