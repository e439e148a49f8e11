"""What graders make of answers whose value is known: right ones written in several ways, and a wrong one.

So it shows before a run which gold answers a reward can never grant, and where a reward of training and the grader of
evaluations part. The functions run in the process of `rewards/runner.py`. Left out: answers of a model.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from data.problem import Problem
from data.prompts import answer_line, worked_answer
from rewards.runner import RewardRunner
from rewards.worker import Reply

LOOK_S = 15.0
"""Seconds that may go by in calls of rewards: a reward may be slow, and a run is waiting."""
PROBED = 200
"""Problems on which graders are compared."""


NO_NUMBER = "12345"
"""The wrong answer where the gold is no number."""


@dataclass(frozen=True)
class RewardProbe:
    """What a reward function makes of texts that are right by construction."""

    name: str
    graded: int
    """Problems looked at."""
    never: tuple[str, ...]
    """Gold answers for which no form of `FORMS` earned more than 0."""
    reads_answers: bool
    """Whether a right answer line earns more than a wrong one, on most problems."""
    fails: str = ""
    """How it failed, in words, if it did so on every one of these texts."""


@dataclass(frozen=True)
class Disagreement:
    """One way to write an answer that a reward of training and the grader of evaluations judge differently."""

    reward: str
    writing: str
    """Which way, in words."""
    count: int
    probed: int
    text: str
    """An example."""
    answer: str
    earned: bool
    """Whether the reward paid for it; the evaluation says the opposite."""


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
    *,
    seconds: float = LOOK_S,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[tuple[RewardProbe, ...], tuple[Disagreement, ...]]:
    """Grade answers whose value is known, as far as time allows: problems come in random order.

    Args:
        rewards: reward functions of training.
        judges: reward functions of evaluations, the one that decides what is right first; may be none.
        problems: all on which a gold answer may be out of reach; graders are compared on `PROBED` of them.
        timeout: seconds per call.
        seconds: for all calls together; where they are too few, a line on stderr says how far it came.
        should_stop: asked before every call; ends the look too.

    Returns:
        what each function makes of them, and where a reward that reads answers and the judge part.
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
    graders, disagreements = [], []
    for k, name in enumerate(names):
        earned = {i: {what: values[i, text][k] for what, text in texts[i].items()} for i in seen}
        graders.append(_probe(name, earned, problems, errors.get(name, "")))
        if judges and name in rewards and _reads(earned, "line"):
            judge = names.index(judges[0])
            judged = {i: {what: values[i, text][judge] for what, text in texts[i].items()} for i in seen}
            if _reacts(judged):
                others = [(i, what) for i in seen if "wrong line" in texts[i] for what in writings(problems[i])]
                rows = [(what, texts[i][what], problems[i]) for i, what in others]
                both = [[verdicts[i][what] for i, what in others] for verdicts in (earned, judged)]
                disagreements += _disagreements(name, rows, *both)
    return tuple(graders), tuple(disagreements)


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


def _probe(name: str, earned: dict[int, dict], problems: Sequence[Problem], error: str) -> RewardProbe:
    """What a function makes of the problems, from what it gave for each text."""
    forms = {i: [given.get(form) for form in FORMS] for i, given in earned.items()}
    never = tuple(problems[i].answer for i, given in forms.items() if max(value or 0.0 for value in given) <= 0)
    failed = all(value is None for given in forms.values() for value in given)
    reads = _reads(earned, "line") or _reads(earned, "bare")
    return RewardProbe(name, len(earned), never, reads, error if failed else "")


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
    """By writing: how often, of how many, and the first example."""
    rows: dict[str, list] = {}
    for (writing, text, problem), a, b in zip(others, earned, judged, strict=True):
        rows.setdefault(writing, []).append((text, problem.answer, (a or 0) > 0, (b or 0) > 0))
    found = []
    for writing, cases in rows.items():
        apart = [case for case in cases if case[2] != case[3]]
        if apart:
            text, answer, paid, _ = apart[0]
            found.append(Disagreement(name, writing, len(apart), len(cases), text, answer, paid))
    return found


def writings(problem: Problem) -> dict[str, str]:
    """Ways to answer a problem rightly, by what is special about each; the first two are how exemplars do it."""
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
    plain = gold.replace(",", "")
    if plain.lstrip("-").isdigit() and abs(int(plain)) >= 1000:
        other = plain if "," in gold else f"{int(plain):,}"
        texts["the thousands comma written otherwise than in the data"] = f"So:\n{answer_line(other)}"
    if gold.startswith("-"):
        texts["the sign left out (a wrong answer)"] = f"So:\n{answer_line(gold[1:])}"
    if not problem.info.get("stop"):
        run_on = f"\n\nQuestion: What else?\n{answer_line(wrong)}"
        texts["right, then another question is asked and answered"] = texts["the worked solution"] + run_on
    return texts


def wrong_answer(gold: str) -> str:
    """Another number than the gold."""
    try:
        return f"{float(gold.replace(',', '')) + 1:.15g}"
    except ValueError:
        return NO_NUMBER
