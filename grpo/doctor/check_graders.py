"""Check the rewards and graders: try them on answers that are known to be right or wrong, before a run.

This finds gold answers that a reward never accepts, and answers that the training reward and the grader of evaluations
judge differently. The reward functions run in the worker process of `rewards/runner.py`. Left out: answers of a model.
"""

import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data.check import has_tests, perfect
from data.problem import Problem
from data.prompts import answer_line, worked_answer
from grpo.config import Config
from grpo.doctor.finding import Finding
from grpo.evaluation.graders import reaches
from rewards import full_value
from rewards.runner import RewardRunner

LOOK_S = 15.0
"""Seconds for all calls of rewards. A reward may be slow, and a run is waiting."""
WHOLE_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})")
"""A gold whose thousands commas can be added or left out: `3,4` is none."""
NO_NUMBER = "12345"
"""The wrong answer where the gold is no number."""

LINE, WRONG_LINE = "the answer line alone", "the answer line of a wrong answer"
BARE, WRONG_BARE = "the answer as it stands", "a wrong answer as it stands"
WORKED, SOLUTION = "the worked solution", "the data's solution as it stands"
SAMPLE, WRONG_SAMPLE = "the answer as", "a wrong answer as"
"""By the `sample` of a file of rewards; `boxed.py reads it` follows."""
RIGHT = (LINE, WORKED, BARE, SOLUTION, SAMPLE)
"""How the names of right answers begin, in the forms that are known here."""
OTHER_FORMS = (BARE, WRONG_BARE, SOLUTION, SAMPLE, WRONG_SAMPLE)
"""How the names of what is not in the form of the exemplars begin. Graders that judge it differently may both be right.
"""

Graded = tuple[Problem, dict[str, dict[str, float | None]]]
"""A problem, and what each function gave for each of its `writings`: {function: {writing: value}}."""


class _Bounded(RewardRunner):
    """Gives up, with TimeoutError, before a call that would begin when `late()` is True."""

    late: Callable[[], bool] = staticmethod(lambda: False)

    def _reply(self) -> tuple:
        if self.late():
            raise TimeoutError
        return super()._reply()


def examine(
    config: Config,
    judges: Sequence[str],
    problems: Sequence[Problem],
    *,
    seconds: float = LOOK_S,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Finding]:
    """Grade answers whose value is known, on as many problems as time allows. Problems come in random order.

    Args:
        config: its `rewards` and their options.
        judges: the reward functions of evaluations; the first decides what is right. May be empty.
        problems: each is tried with its `writings`.
        seconds: for all calls together. If they do not suffice, a line on stderr says how many problems were tried.
        should_stop: asked before every call; True ends the look too.
    """
    names = list(dict.fromkeys([*config.rewards, *judges]))
    problems = [problem for problem in problems if problem.answer or not has_tests(problem)]  # whose answer is known
    graded: list[Graded] = []
    end = time.monotonic() + seconds
    with _Bounded(names, min(config.reward_timeout, seconds), chat=config.chat) as runner, suppress(TimeoutError):
        samples = {Path(file.__file__).name: file.sample for file in runner.files if hasattr(file, "sample")}
        runner.late = lambda: should_stop() or time.monotonic() > end
        for problem in random.Random(0).sample(problems, len(problems)):
            texts = writings(problem, samples)
            values = runner.score(list(texts.values()), [problem] * len(texts))
            if seconds < config.reward_timeout and runner.late():
                break  # a call may have been cut by the end of the look, before its own limit
            by_name = zip(names, values, strict=True)
            graded.append((problem, {name: dict(zip(texts, given, strict=True)) for name, given in by_name}))
    if len(graded) < len(problems) and not should_stop():
        seen = f"{len(graded)} of {len(problems)} problems"
        print(f"rewards: calls are slow: the doctor looked at {seen}", file=sys.stderr)
    if not graded:
        return []
    needed = {name: full_value(name) for name in judges}
    if judges and config.eval_threshold is not None:
        needed[judges[0]] = config.eval_threshold
    found: list[Finding] = []
    for name in names:
        found += _right_answers(config, name, graded, needed.get(name, 0.0), runner.first_errors.get(name, ""))
    if judges and _reading(judges[0], graded, LINE, WRONG_LINE) > 0:
        for name in config.rewards:
            if _reading(name, graded, LINE, WRONG_LINE) > 0.5:
                found += _disagreements(name, judges[0], graded, needed[judges[0]])
    return found


def _right_answers(c: Config, name: str, graded: list[Graded], needed: float, error: str) -> Iterator[Finding]:
    """What a function makes of right answers.

    Args:
        c: the config.
        name: of the function.
        graded: what it gave.
        needed: what counts. In evaluations that is a stated value; 0: anything above nothing, as in training.
        error: its first error, in words.
    """
    never, highest, failed = [], 0.0, True
    for problem, earned in graded:
        values = [value for form, value in earned[name].items() if form.startswith(RIGHT)]
        values = [value for value in values if value != -math.inf]  # which says that it does not apply
        if not values:
            failed = False
            continue
        best = max(value or 0.0 for value in values)
        enough = reaches(best, needed) if needed else best > 0
        if not enough:
            never.append(problem.info["name"] if has_tests(problem) else problem.answer)
        highest = max(highest, best)
        failed = failed and all(value is None for value in values)
    share = len(never) / len(graded)
    shown = ", ".join(repr(answer) for answer in dict.fromkeys(never[:3]))
    counted = f"{len(never)} of {len(graded)}"
    these = f"{share:.2%} of the gold answers ({counted}: {shown}), even written as the exemplars are"
    if failed:
        place = name.replace(":", ", function ") if ".py:" in name else name.replace(".", ".py, function ")
        yield Finding(
            "sure",
            f"{name} fails on every text it was tried on: {error}",
            "Where a reward fails, nothing is learned. Where a grader fails, the text counts as wrong.",
            f"Correct {place}.",
        )
    elif never and 0 < highest < needed:
        full = f"{name.partition('.')[2]}.full_value = {highest:g}"
        threshold = ", or --eval_threshold" if name == c.eval_correct else ""
        yield Finding(
            "warning" if share < 0.2 else "sure",
            f"{name} grants less than {needed:g} to {these}",
            f"In evaluations a part of {needed:g} does not count.",
            f"State its full value beside the function: {full}{threshold}.",
        )
    elif never:
        reads = max(_reading(name, graded, LINE, WRONG_LINE), _reading(name, graded, BARE, WRONG_BARE)) > 0.5
        level = "warning" if share < 0.2 or not reads else "sure"
        means = "A right answer to these problems never gets this reward, however it is written."
        if name not in c.rewards:
            means = f"No model can reach more than {1 - share:.1%}."
        if share == 1:
            level = "note"
            means = "It reads answers of another form than `#### The final answer is 18`, or it is a penalty."
        mend = "Use another reward (rewards/gsm8k.py reads commas, signs, units), or mend this one."
        if name.startswith("gsm8k."):
            mend = "Write each gold as one number (1080, 1,080 or 12.5), or use a reward that reads golds of this form."
        yield Finding(level, f"{name} grants nothing to {these}", means, mend)


def _reading(name: str, graded: list[Graded], right: str, wrong: str) -> float:
    """The share of the problems on which a right answer earns more than a wrong one."""
    better = sum((earned[name][right] or 0.0) > (earned[name][wrong] or 0.0) for _, earned in graded)
    return better / len(graded)


def _disagreements(reward: str, judge: str, graded: list[Graded], needed: float) -> Iterator[Finding]:
    """The ways of writing that a reward of training and the judge of evaluations judge differently.

    A reward pays for a text with its full value, or with the most that it gave for any.
    """
    tried: dict[str, list[tuple]] = {}
    for problem, earned in graded:
        for writing, text in writings(problem).items():
            if not writing.startswith(OTHER_FORMS) and earned[reward][writing] != -math.inf:
                case = (text, problem.answer, earned[reward][writing] or 0.0, earned[judge][writing])
                tried.setdefault(writing, []).append(case)
    most = max(value for cases in tried.values() for _, _, value, _ in cases)
    pays = min(full_value(reward), most)
    for writing, cases in tried.items():
        apart = []
        for text, answer, value, judged in cases:
            paid = value > 0 and reaches(value, pays)
            if paid != reaches(judged, needed):
                apart.append((text, answer, paid))
        if apart:
            text, answer, paid = apart[0]
            pays_for, counts = ("pays for", "wrong") if paid else ("does not pay for", "right")
            tried_on = f"{writing} ({len(apart)} of {len(cases)} answers tried), such as {text[-60:]!r} for {answer!r}"
            yield Finding(
                "warning",
                f"{reward} {pays_for} what {judge} counts as {counts}: {tried_on}",
                "Training follows one and is measured by the other. A gain or a loss may come from the grader alone.",
                f"--eval_correct {reward}, or train with {judge}.",
            )


def writings(problem: Problem, samples: Mapping[str, Callable[[Problem], str]] | None = None) -> dict[str, str]:
    """{what is special: text} for several ways to write a right or a wrong answer.

    Args:
        problem: its answer is known.
        samples: {file of rewards: its `sample`}.
    """
    if has_tests(problem):  # the only right answer that is known
        return {LINE: perfect(problem), WRONG_LINE: "", BARE: perfect(problem), WRONG_BARE: ""}
    gold, wrong = problem.answer, wrong_answer(problem.answer)
    line = whole = answer_line(gold)
    texts = {LINE: line, WRONG_LINE: answer_line(wrong), BARE: gold, WRONG_BARE: wrong}
    for file, sample in (samples or {}).items():
        texts[f"{SAMPLE} {file} reads it"] = sample(problem)
        texts[f"{WRONG_SAMPLE} {file} reads it"] = sample(replace(problem, answer=wrong))
    if isinstance(problem.info.get("solution"), str):
        whole = worked_answer({**problem.info, "answer": gold})
        texts |= {WORKED: whole, SOLUTION: problem.info["solution"]}
    texts["no #### before the answer"] = f"The final answer is {gold}."
    texts["an answer line with a wrong number, then the right one"] = f"{answer_line(wrong)}\n{line}"
    if wrong != NO_NUMBER:
        texts["an equation on the answer line"] = f"So:\n#### 0 + {gold} = {gold}"
    if WHOLE_NUMBER.fullmatch(gold) and abs(int(plain := gold.replace(",", ""))) >= 1000:
        other = plain if "," in gold else f"{int(plain):,}"
        texts["the thousands comma written otherwise than in the data"] = f"So:\n{answer_line(other)}"
    if gold.startswith("-"):
        texts["the sign left out (a wrong answer)"] = f"So:\n{answer_line(gold[1:])}"
    if not problem.info.get("stop"):
        run_on = f"\n\nQuestion: What else?\n{answer_line(wrong)}"
        texts["right, then another question is asked and answered"] = whole + run_on
    return texts


def wrong_answer(gold: str) -> str:
    """A number that differs from the gold."""
    try:
        return f"{float(gold.replace(',', '')) + 1:.15g}"
    except ValueError:
        return NO_NUMBER
