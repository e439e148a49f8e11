"""Test the graders on answers that are known to be right or wrong, before a run.

This finds gold answers that a reward never accepts, and answers that the training reward and the grader of evaluations
judge differently. The reward functions run in the worker process of `rewards/runner.py`. Left out: answers of a model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.problem import Problem
from data.prompts import answer_line, worked_answer
from grpo.evaluation.graders import reaches
from rewards import full_value
from rewards.runner import RewardRunner

PROBED = 200
"""Problems on which graders are compared."""
WHOLE_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})")
"""A gold whose thousands commas can be added or left out: `3,4` is none."""


@dataclass(frozen=True)
class RewardProbe:
    """How a reward function grades texts that are right by construction."""

    name: str
    graded: int
    """The number of problems it was tested on."""
    never: tuple[str, ...]
    """Gold answers for which neither the worked solution nor the answer line alone earned `needed`."""
    reads_answers: bool
    """Whether a right answer line gets more than a wrong one on most problems."""
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


def examine(
    rewards: Sequence[str],
    judges: Sequence[str],
    problems: Sequence[Problem],
    timeout: float,
    threshold: float | None = None,
) -> tuple[tuple[RewardProbe, ...], tuple[Disagreement, ...]]:
    """Grade answers whose value is known.

    Args:
        rewards: the reward functions of training.
        judges: the reward functions of evaluations; the first decides what is right. May be empty.
        problems: each is tested with its gold answer; graders are compared on `PROBED` of them.
        timeout: seconds per call.
        threshold: value of the first judge from which an answer is right; None: its full value.

    Returns:
        A probe of each function, and the disagreements between the first judge and each reward that reads answers.
    """
    names = list(dict.fromkeys([*rewards, *judges]))
    probed = problems[:: max(1, -(-len(problems) // PROBED))]
    texts = [list(writings(problem).values())[:2] for problem in problems]
    with RewardRunner(names, timeout) as runner:
        lines = runner.score([pair[0] for pair in texts], problems)
        solutions = runner.score([pair[1] for pair in texts], problems)
        right = runner.score([answer_line(p.answer) for p in probed], probed)
        wrong = runner.score([answer_line(wrong_answer(p.answer)) for p in probed], probed)
        others = [(writing, text, problem) for problem in probed for writing, text in writings(problem).items()]
        verdicts = runner.score([text for _, text, _ in others], [problem for *_, problem in others])
    needed = {name: full_value(name) for name in judges}
    if judges and threshold is not None:
        needed[judges[0]] = threshold
    graders = []
    for k, name in enumerate(names):
        best = [max(a or 0.0, b or 0.0) for a, b in zip(lines[k], solutions[k], strict=True)]
        enough = [reaches(value, needed[name]) if name in needed else value > 0 for value in best]
        never = tuple(problem.answer for problem, counts in zip(problems, enough, strict=True) if not counts)
        better = sum((a or 0.0) > (b or 0.0) for a, b in zip(right[k], wrong[k], strict=True))
        failed = all(value is None for value in (*lines[k], *solutions[k]))
        fails = runner.first_errors[name] if failed else ""
        reads, highest = 2 * better > len(probed), max(best, default=0.0)
        graders.append(RewardProbe(name, len(problems), never, reads, fails, needed.get(name, 0.0), highest))
    disagreements = []
    for grader in graders:
        if judges and grader.reads_answers and grader.name in rewards:
            earned, judged = verdicts[names.index(grader.name)], verdicts[names.index(judges[0])]
            pays = min(full_value(grader.name), max(value or 0.0 for value in earned))
            paid = [(value or 0.0) > 0 and reaches(value, pays) for value in earned]
            right = [reaches(value, needed[judges[0]]) for value in judged]
            disagreements += _disagreements(grader.name, others, paid, right)
    return tuple(graders), tuple(disagreements)


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
        "an equation on the answer line": f"So:\n#### 0 + {gold} = {gold}",
    }
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
        return "12345"
