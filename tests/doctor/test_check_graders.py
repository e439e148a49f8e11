"""What graders make of known answers: golds out of reach, and where two of them part."""

import json
import math
import os
from pathlib import Path

import pytest

import data
from data.problem import Problem
from data.prompts import STOP
from grpo.doctor import check_graders
from grpo.doctor.check_graders import examine, writings, wrong_answer
from grpo.doctor.finding import Finding
from rewards import boxed, gsm8k
from rewards.runner import RewardRunner
from tests.fakes.known_facts import config
from tests.fakes.runs import PATIENCE

OURS, PUBLISHED, FORMAT = "gsm8k.correctness", "gsm8k_published.correctness", "gsm8k.format"


def problem(answer: str, **info) -> Problem:
    return Problem("Q", answer, {"question": "Q", "solution": "1 + 1 = 2", "shots": [], "stop": STOP} | info)


def look(rewards: tuple, judges: tuple, problems: list, timeout: float = PATIENCE, **options) -> list[Finding]:
    """What the doctor finds. `threshold` is that of the first judge; other options are those of `examine`."""
    changes = {"rewards": rewards, "reward_weights": (1.0,) * len(rewards), "reward_timeout": timeout}
    changes["eval_threshold"] = options.pop("threshold", None)
    found = examine(config(**changes), judges, problems, **options)
    assert all(finding.means and finding.do for finding in found)
    return found


def said(found: list[Finding]) -> list[tuple[str, str]]:
    """(level, what) without the problems that are named as an example."""
    return [(finding.level, finding.what.partition(" (")[0]) for finding in found]


def test_a_gold_with_a_comma_is_out_of_reach_of_the_published_reward():
    golds = [problem(gold) for gold in ("1,080", "-7", *map(str, range(20, 38)))]
    (finding,) = look((PUBLISHED, OURS, FORMAT), (), golds)
    assert finding.level == "warning"
    assert finding.what.startswith(f"{PUBLISHED} grants nothing to 10.00% of the gold answers (2 of 20: '")
    assert "1,080" in finding.what and "-7" in finding.what
    (many,) = look((PUBLISHED,), (), golds[:5])
    assert many.level == "sure" and "40.00%" in many.what


def test_where_training_and_evaluation_part():
    found = look((PUBLISHED,), (OURS, FORMAT), [problem("18"), problem("20"), problem("1,080")])
    lines = [finding.what for finding in found]
    (two_lines,) = [line for line in lines if ": an answer line with a wrong number, then the right one (" in line]
    assert two_lines.startswith(f"{PUBLISHED} does not pay for what {OURS} counts as right: ")
    assert "(3 of 3 answers tried), such as '#### The final answer is " in two_lines
    (comma,) = [line for line in lines if ": the answer line alone (" in line]
    assert comma.endswith("(1 of 3 answers tried), such as '#### The final answer is 1,080' for '1,080'")


def test_a_sign_that_is_not_read_shows():
    found = said(look((OURS,), (PUBLISHED,), [problem("-7"), problem("18")]))
    assert ("warning", f"{OURS} pays for what {PUBLISHED} counts as wrong: the worked solution") in found


def test_equal_graders_never_part_and_one_of_the_form_is_not_compared():
    assert look((OURS,), (OURS, FORMAT), [problem("1,080"), problem("-7")]) == []
    assert look((FORMAT,), (OURS,), [problem("18")]) == []


@pytest.mark.parametrize("broken_on", ["some", "all"])
def test_a_reward_that_fails_on_every_text_shows_with_its_reason(monkeypatch, broken_on):
    score = RewardRunner.score

    def fail(runner, completions, problems):
        format_values, values = score(runner, completions, problems)
        runner.first_errors[OURS] = "it broke"
        return [format_values, [None if broken_on == "all" or "19" in text else 1.0 for text in completions]]

    monkeypatch.setattr(RewardRunner, "score", fail)
    found = look((FORMAT, OURS), (), [problem("18"), problem("20")])
    assert said(found) == [("sure", f"{OURS} fails on every text it was tried on: it broke")] * (broken_on == "all")


def test_a_reward_that_fails_is_named_by_its_file_and_function(tmp_path):
    (tmp_path / "own.v2.py").write_text("def broken(completion, problem):\n    raise KeyError\n")
    found = look((f"{tmp_path}/own.v2.py:broken", OURS), (), [problem("18")])
    assert [finding.do for finding in found] == [f"Correct {tmp_path}/own.v2.py, function broken."]


def test_ways_to_write_a_right_answer_are_right_but_where_they_say_so():
    odd = {*check_graders.OTHER_FORMS, "no #### before the answer", "an equation on the answer line"}
    for answer in ("18", "1,080", "1080", "-7"):
        for writing, text in writings(problem(answer)).items():
            right = gsm8k.correctness(text, problem(answer)) == 1.0
            assert right == (writing not in odd and "wrong answer" not in writing), (answer, writing)


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
    (finding,) = look((OURS,), (), [problem(gold) for gold in ("3,4", "18", "12,5", "1_000")])
    assert finding.what.startswith(f"{OURS} grants nothing to 75.00% of the gold answers (3 of 4: ")
    assert all(repr(gold) in finding.what for gold in ("3,4", "12,5", "1_000"))
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
    found = look((OURS,), (OURS,), [problem("18", solution="no")], threshold=threshold)
    parts = [finding for finding in found if "grants" in finding.what]
    assert len(parts) == never
    for finding in parts:
        assert finding.what.startswith(f"{OURS} grants less than 1 to 100.00% of the gold answers")
        assert finding.do.endswith("beside the function: correctness.full_value = 0.5, or --eval_threshold.")
    for finding in found[never:]:  # training pays in full for what is not right
        assert f"pays for what {OURS} counts as wrong" in finding.what and never


def test_c71_where_both_pay_in_full_partial_credit_makes_no_disagreement(monkeypatch):
    parts = {"#### The final answer is 18": 1.0, "#### The final answer is 19": 0.05}
    monkeypatch.setattr(
        RewardRunner, "score", lambda runner, texts, problems: [
            [parts.get(text, 0.05) for text in texts], [float(parts.get(text, 0.0) == 1.0) for text in texts]
        ],
    )  # fmt: skip
    assert look((PUBLISHED,), (OURS,), [problem("18", solution="no")]) == []


@pytest.mark.parametrize(("gold", "wrong"), [("18", "19"), ("1,080", "1081"), ("-7", "-6"), ("x", "12345")])
def test_a_wrong_answer_is_another_number(gold, wrong):
    assert wrong_answer(gold) == wrong


def grade_by(monkeypatch, **rewards) -> list[str]:
    """Let these functions grade, in this process; returns the texts that they are called with."""
    called = []

    def score(runner, completions, problems):
        for text in completions:
            if runner.late():
                raise TimeoutError
            called.append(text)
        return [[rewards[n](t, p) for t, p in zip(completions, problems, strict=True)] for n in runner.names]

    monkeypatch.setattr(check_graders, "full_value", lambda name: 1.0)
    monkeypatch.setattr(RewardRunner, "score", score)
    monkeypatch.setattr(RewardRunner, "__init__", lambda runner, names, timeout, chat: vars(runner).update(files=[],
        names=names, timeout=timeout, first_errors={}, _workers=[]))  # fmt: skip
    return called


MANY = [problem(str(i)) for i in range(500)]


def test_c65_a_slow_reward_is_looked_at_as_long_as_time_allows_and_that_is_said(monkeypatch, capsys):
    """Kind: work before the first step that has no bound. Each call takes a second of a clock that tests can turn."""
    now = [0.0]

    def slow(text, problem):
        now[0] += 1
        return 0.0

    monkeypatch.setattr(check_graders.time, "monotonic", lambda: now[0])
    called = grade_by(monkeypatch, slow=slow)
    (finding,) = look(("slow",), (), MANY, 60.0, seconds=40.0)
    assert 40 <= len(called) <= 49 and "slow grants nothing to 100.00% of the gold answers (4 of 4: " in finding.what
    assert capsys.readouterr().err == "rewards: calls are slow: the doctor looked at 4 of 500 problems\n"
    now[0], called[:] = 0.0, []
    assert look(("slow",), (), MANY, 60.0, seconds=3.0) == [] and len(called) <= 9


def test_c65_a_stop_that_is_asked_for_ends_the_look(monkeypatch, capsys):
    """Kind: as above; a signal waited for all of it."""
    called = grade_by(monkeypatch, quick=lambda text, problem: 0.0)
    (finding,) = look(("quick",), (), MANY, 5.0, should_stop=lambda: len(called) >= 100)
    assert len(called) == 100 and f"({100 // 9} of {100 // 9}: " in finding.what and capsys.readouterr().err == ""


def test_c65_a_quick_reward_is_looked_at_in_full_and_asked_no_text_twice(monkeypatch, capsys):
    """Kind: as above."""
    called = grade_by(monkeypatch, quick=lambda text, problem: 0.0)
    (finding,) = look(("quick",), (), MANY, 5.0)
    assert "(500 of 500: " in finding.what and capsys.readouterr().err == ""
    assert len(called) == sum(len({*writings(problem).values()}) for problem in MANY)


def test_c65_a_call_that_the_look_has_no_time_for_is_no_failure(monkeypatch):
    """Kind: as above. The reward may take a minute a call; what was cut by the look's own limit says nothing of it."""
    now = [0.0]

    def cut(text, problem):
        now[0] += 20.0

    monkeypatch.setattr(check_graders.time, "monotonic", lambda: now[0])
    grade_by(monkeypatch, cut=cut)
    assert look(("cut",), (), MANY, 60.0, seconds=15.0) == []


def test_c65_a_real_worker_is_left_before_its_next_call():
    """Kind: as above."""
    runner = check_graders._Bounded([OURS], PATIENCE)
    replies = iter([False, False, True])
    runner.late = lambda: next(replies)
    with pytest.raises(TimeoutError):
        runner.score(["18"] * 9, [problem("18")] * 9)
    assert runner._workers[0].process is None


def as_json(text: str, problem: Problem) -> float:
    try:
        return float(json.loads(text)["answer"] == json.loads(problem.answer)["answer"])
    except (ValueError, TypeError, KeyError):
        return 0.0


def test_c66_a_task_of_another_form_is_not_probed_in_ours(monkeypatch):
    """Kind: a check takes one form of answer for the only one.

    The answers of this task are JSON. Its rewards are found to read them as they stand, and none is said to disagree.
    """
    contains = {"json": as_json, "part": lambda text, problem: 0.05 if problem.answer in text else 0.0}
    grade_by(monkeypatch, **contains)
    problems = [Problem("Q", json.dumps({"answer": i}), {"stop": []}) for i in range(9)]
    assert look(("part", "json"), ("json",), problems, 5.0) == []


def test_c66_the_solution_of_the_data_shows_the_form(monkeypatch):
    """Kind: as above. What earns a reward only as the data's own solutions are written is within reach."""
    grade_by(monkeypatch, boxed=lambda text, problem: float(text.endswith(f"\\boxed{{{problem.answer}}}")))
    assert look(("boxed",), (), [problem(str(i), solution=f"so \\boxed{{{i}}}") for i in range(9)], 5.0) == []


def test_c66_a_reward_whose_form_is_unknown_is_no_warning_at_the_start(monkeypatch):
    """Kind: as above. Nothing that is tried earns it: it may be of another form, or a penalty."""
    grade_by(monkeypatch, penalty=lambda text, problem: -len(text) / 1000)
    assert [finding.level for finding in look(("penalty",), (), MANY[:9], 5.0)] == ["note"]


def test_c66_an_equation_is_no_way_to_write_a_text():
    """Kind: as above."""
    assert "an equation on the answer line" in writings(problem("18"))
    assert "an equation on the answer line" not in writings(problem("Paris"))


@pytest.mark.skipif("GRPO_TEST_DATA" not in os.environ, reason="needs GRPO_TEST_DATA, a directory with gsm8k/")
def test_every_gold_of_gsm8k_is_within_reach_of_our_reward():
    path = str(Path(os.environ["GRPO_TEST_DATA"]) / "gsm8k")
    (finding,) = look((OURS, FORMAT, PUBLISHED), (), data.load("gsm8k", "test", path=path))
    assert finding.what.startswith(f"{PUBLISHED} grants nothing to ") and " of 1319: " in finding.what


def test_what_a_reward_has_nothing_to_say_of_is_no_answer_that_it_refuses(monkeypatch):
    """The reward applies to golds of two digits alone; to none of the problems it is no failure either."""

    def score(runner, texts, problems, told=None):
        two = len(problems[0].answer) == 2
        return [
            [float(problem.answer in text) if two else -math.inf for text, problem in zip(texts, problems, strict=True)]
        ]

    monkeypatch.setattr(RewardRunner, "score", score)
    assert look((OURS,), (), [problem("18"), problem("7"), problem("9")]) == []
    assert look((OURS,), (), [problem("7")]) == []


def test_of_programming_problems_the_solutions_are_tried(monkeypatch):
    tests = {"kind": "stdin", "cases": [{"input": "", "output": "1"}]}
    code = {"tests": tests, "form": "block", "solution": None}
    solved = [problem(f"print({i})", name=f"p{i}", **code) for i in range(5)]
    tried = []

    def score(runner, texts, problems):
        tried.extend(texts)
        return [[float("print" in text and "(4)" not in text) for text in texts]]

    monkeypatch.setattr(check_graders._Bounded, "score", score)
    (finding,) = look((OURS,), (), [*solved, problem("", name="without", **code)])
    assert set(tried) == {"", *(f"```python\nprint({i})\n```\n" for i in range(5))}
    assert finding.what.startswith(f"{OURS} grants nothing to 20.00% of the gold answers (1 of 5: 'p4')")


def test_a_file_of_rewards_shows_the_form_that_it_reads():
    """Without it the doctor would take a reward of another form for one that never pays."""
    boxes = [Problem("What?", r"\frac{1}{2}", {"stop": STOP}), Problem("What else?", "18", {"stop": STOP})]
    texts = writings(boxes[1], {"boxed.py": boxed.sample})
    assert texts["the answer as boxed.py reads it"] == r"\boxed{18}"
    assert texts["a wrong answer as boxed.py reads it"] == r"\boxed{19}"
    assert look(("boxed.format",), (), boxes) == [] == look(("think.format",), (), boxes)
    (finding,) = look((OURS,), ("boxed.format",), boxes[:1])
    assert finding.what.startswith(f"{OURS} grants nothing to 100.00% of the gold answers"), (
        "a box is none of its forms"
    )
