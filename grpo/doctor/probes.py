"""Test the graders on answers that are known to be right or wrong, before a run.

This finds gold answers that a reward never accepts, and answers that the training reward and the grader of evaluations
judge differently. The reward functions run in the worker process of `rewards/runner.py`. Left out: answers of a model.
"""

import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from data.problem import Problem
from data.prompts import answer_line, worked_answer
from grpo.evaluation.graders import reaches
from rewards import full_value
from rewards.runner import RewardRunner
from rewards.worker import Reply

LOOK_S = 15.0
"""Seconds for all calls of rewards. A reward may be slow, and a run is waiting."""
PROBED = 200
"""Problems on which graders are compared."""
WHOLE_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})")
"""A gold whose thousands commas can be added or left out: `3,4` is none."""
NO_NUMBER = "12345"
"""The wrong answer where the gold is no number."""


@dataclass(frozen=True)
class RewardProbe:
    """How a reward function grades texts that are right by construction."""

    name: str
    graded: int
    """The number of problems it was tested on."""
    never: tuple[str, ...]
    """Gold answers for which no form of `FORMS` earned `needed`."""
    reads_answers: bool
    """Whether a right answer gets more than a wrong one on most problems."""
    fails: str = ""
    """How it failed, in words, if it did so on every one of these texts."""
    needed: float = 0.0
    """What counts: in evaluations a stated threshold; 0: anything above nothing, as in training."""
    highest: float = 0.0
    """The most that any of these texts earned."""


@dataclass(frozen=True)
class Disagreement:
    """One way of writing an answer that the training reward and the grader of evaluations judge differently."""

    reward: str
    writing: str
    """The way of writing, in words."""
    count: int
    probed: int
    text: str
    """An example text."""
    answer: str
    earned: bool
    """Whether the reward accepted it; the grader of evaluations says the opposite."""


class _Bounded(RewardRunner):
    """Gives up, with TimeoutError, before a call that would begin when `late()` is True."""

    late: Callable[[], bool] = staticmethod(lambda: False)

    def _reply(self) -> Reply:
        if self.late():
            raise TimeoutError
        return super()._reply()


def examine(
    rewards: Sequence[str],
    judges: Sequence[str],
    problems: Sequence[Problem],
    timeout: float,
    threshold: float | None = None,
    *,
    seconds: float = LOOK_S,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[tuple[RewardProbe, ...], tuple[Disagreement, ...]]:
    """Grade answers whose value is known, on as many problems as time allows. Problems come in random order.

    Args:
        rewards: the reward functions of training.
        judges: the reward functions of evaluations; the first decides what is right. May be empty.
        problems: each is tested with its gold answer; graders are compared on `PROBED` of them.
        timeout: seconds per call.
        threshold: value of the first judge from which an answer is right; None: its full value.
        seconds: for all calls together. If they do not suffice, a line on stderr says how many problems were tested.
        should_stop: asked before every call; True ends the test too.

    Returns:
        A probe of each function, and the disagreements between the first judge and each reward that reads answers.
    """
    names = list(dict.fromkeys([*rewards, *judges]))
    order = random.Random(0).sample(range(len(problems)), len(problems))
    texts = {i: _texts(problems[i], place < PROBED) for place, i in enumerate(order)}
    asked = [(i, text) for i in order for text in dict.fromkeys(texts[i].values())]
    with _Bounded(names, min(timeout, seconds)) as runner:
        values = _score(runner, asked, problems, seconds, should_stop, capped=seconds < timeout)
        errors = runner.first_errors
    seen = [i for i in sorted(order) if all((i, text) in values for text in texts[i].values())]
    if len(seen) < len(order) and not should_stop():
        print(f"rewards: calls are slow: the doctor looked at {len(seen)} of {len(order)} problems", file=sys.stderr)
    if not seen:
        return (), ()
    needed = {name: full_value(name) for name in judges}
    if judges and threshold is not None:
        needed[judges[0]] = threshold
    earned = {
        name: {i: {what: values[i, text][k] for what, text in texts[i].items()} for i in seen}
        for k, name in enumerate(names)
    }
    graders = [_probe(name, earned[name], problems, errors.get(name, ""), needed.get(name, 0.0)) for name in names]
    disagreements = []
    if judges and _reacts(earned[judges[0]]):
        others = [(i, what) for i in seen if "wrong line" in texts[i] for what in writings(problems[i])]
        rows = [(what, texts[i][what], problems[i]) for i, what in others]
        right = [reaches(earned[judges[0]][i][what], needed[judges[0]]) for i, what in others]
        for name in dict.fromkeys(rewards):
            if _reads(earned[name], "line"):
                paid = _paid(name, [earned[name][i][what] for i, what in others])
                disagreements += _disagreements(name, rows, paid, right)
    return tuple(graders), tuple(disagreements)


def _paid(name: str, values: Sequence[float | None]) -> list[bool]:
    """Whether a reward of training pays for texts: its full value, or the most that it gave to any of them."""
    pays = min(full_value(name), max(value or 0.0 for value in values))
    return [(value or 0.0) > 0 and reaches(value, pays) for value in values]


FORMS = ("line", "worked", "bare", "solution")
"""Right answers in the forms that are known here: the answer line, behind the solution, and both as they stand."""


def _texts(problem: Problem, probed: bool) -> dict[str, str]:
    """What graders are tried on, by what it is: right answers and, if `probed`, wrong ones and other writings."""
    line, worked = list(writings(problem).values())[:2]
    texts = {"line": line, "worked": worked, "bare": problem.answer}
    if isinstance(problem.info.get("solution"), str):
        texts["solution"] = problem.info["solution"]
    if probed:
        wrong = wrong_answer(problem.answer)
        texts |= {"wrong line": answer_line(wrong), "wrong bare": wrong, **writings(problem)}
    return texts


def _score(
    runner: _Bounded, asked: list[tuple[int, str]], problems, seconds: float, should_stop, capped: bool
) -> dict[tuple[int, str], list[float | None]]:
    """The K values of each (problem, text), of as many as there was time for, in pieces of about half a second.

    Args:
        capped: whether a call may have been cut by `seconds` and not by its own limit; the piece then says nothing.
    """
    begin = time.monotonic()
    runner.late = lambda: should_stop() or time.monotonic() - begin > seconds
    values: dict[tuple[int, str], list[float | None]] = {}
    size = 1
    with suppress(TimeoutError):
        while (part := asked[len(values) : len(values) + size]) and not runner.late():
            start = time.monotonic()
            scored = runner.score([text for _, text in part], [problems[i] for i, _ in part])
            if capped and runner.late():
                break
            values |= dict(zip(part, map(list, zip(*scored, strict=True)), strict=True))
            size = max(1, min(4 * size, int(size * 0.5 / (time.monotonic() - start + 1e-6))))
    return values


def _probe(name: str, earned: dict[int, dict], problems: Sequence[Problem], error: str, needed: float) -> RewardProbe:
    """What a function makes of the problems, from what it gave for each text."""
    forms = {i: [given.get(form) for form in FORMS] for i, given in earned.items()}
    best = {i: max(value or 0.0 for value in given) for i, given in forms.items()}
    enough = {i: reaches(value, needed) if needed else value > 0 for i, value in best.items()}
    never = tuple(problems[i].answer for i, counts in enough.items() if not counts)
    failed = all(value is None for given in forms.values() for value in given)
    reads = _reads(earned, "line") or _reads(earned, "bare")
    return RewardProbe(name, len(earned), never, reads, error if failed else "", needed, max(best.values()))


def _reads(earned: dict[int, dict], form: str) -> bool:
    """Whether a right answer in this form earns more than a wrong one, on most problems."""
    pairs = [(given[form] or 0.0, given[f"wrong {form}"] or 0.0) for given in earned.values() if "wrong line" in given]
    return 2 * sum(right > wrong for right, wrong in pairs) > len(pairs)


def _reacts(judged: dict[int, dict]) -> bool:
    """Whether a judge gives texts of our form different values; else it reads answers of another form."""
    others = ("bare", "solution", "wrong bare")
    given = [value for values in judged.values() for what, value in values.items() if what not in others]
    return len({(value or 0) > 0 for value in given}) > 1


def _disagreements(name: str, others, earned, judged) -> list[Disagreement]:
    """For each way of writing: the number of disagreements, the number of cases, and an example."""
    rows: dict[str, list] = {}
    for (writing, text, problem), a, b in zip(others, earned, judged, strict=True):
        rows.setdefault(writing, []).append((text, problem.answer, a, b))
    found = []
    for writing, cases in rows.items():
        apart = [case for case in cases if case[2] != case[3]]
        if apart:
            text, answer, paid, _ = apart[0]
            found.append(Disagreement(name, writing, len(apart), len(cases), text, answer, paid))
    return found


def writings(problem: Problem) -> dict[str, str]:
    """{what is special: answer text} for several ways to write an answer. The first two are those of the exemplars."""
    gold = problem.answer
    line = answer_line(gold)
    wrong = wrong_answer(gold)
    texts = {
        "the answer line alone": line,
        "the worked solution": worked_answer({**problem.info, "answer": gold}) if "solution" in problem.info else line,
        "no #### before the answer": f"The final answer is {gold}.",
        "an answer line with a wrong number, then the right one": f"{answer_line(wrong)}\n{line}",
    }
    if wrong != NO_NUMBER:
        texts["an equation on the answer line"] = f"So:\n#### 0 + {gold} = {gold}"
    if WHOLE_NUMBER.fullmatch(gold) and abs(int(plain := gold.replace(",", ""))) >= 1000:
        other = plain if "," in gold else f"{int(plain):,}"
        texts["the thousands comma written otherwise than in the data"] = f"So:\n{answer_line(other)}"
    if gold.startswith("-"):
        texts["the sign left out (a wrong answer)"] = f"So:\n{answer_line(gold[1:])}"
    if not problem.info.get("stop"):
        run_on = f"\n\nQuestion: What else?\n{answer_line(wrong)}"
        texts["right, then another question is asked and answered"] = texts["the worked solution"] + run_on
    return texts


def wrong_answer(gold: str) -> str:
    """A number that differs from the gold."""
    try:
        return f"{float(gold.replace(',', '')) + 1:.15g}"
    except ValueError:
        return NO_NUMBER
