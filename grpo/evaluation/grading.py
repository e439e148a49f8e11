"""From transcripts to numbers: accuracies, paired differences, and where a gain comes from. This needs no model.

The same texts are graded by each grader under two stop policies. `eos` keeps the text after the first stop string
(the run-on), and `stop_string` cuts it off. This separates three sources of a gain: learning to stop, what the grader
misreads, and better answers. A cell is the result of one model, number of shots, stop policy and grader. Left out:
making the transcripts (`transcribe.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

import rewards
from data.problem import Problem
from grpo.evaluation.graders import GRADERS, reaches
from grpo.evaluation.statistics import majority, mcnemar, mean_interval, pass_at_k, wilson
from rewards.gsm8k import one_number
from rewards.runner import RewardRunner

STOPS = ("stop_string", "eos")


@dataclass
class Grades:
    """One model's graded answers at one number of shots, under one stop policy and one grader.

    Rows are in the order of the n problems. The k samples of a problem are adjacent rows.
    """

    model: str
    shots: int
    stop: str
    grader: str
    values: list[str | None]
    correct: np.ndarray
    """[n * k] bool."""
    lenient: np.ndarray
    """[n * k] bool: right as `last_number` reads the same text."""
    numbers: bool
    """Whether any gold is a number; else the lenient reading says nothing."""
    formatted: np.ndarray
    """[n * k] bool: whether the text has the format."""
    finished: np.ndarray
    """[n * k] bool: ended by EOS or, under `stop_string`, by a stop string."""
    run_on: np.ndarray
    """[n * k] bool: the text contains a stop string. This does not depend on the stop policy."""
    tokens: np.ndarray
    """[n * k]: sampled tokens that count under the stop policy."""
    samples: int
    """k, the samples per problem."""
    failures: dict[str, dict]
    """Of the reward functions that made these grades: {name: {"texts": how many it failed on, "first": in words}}."""
    partial: dict[str, dict]
    """Of those that gave a part of their credit: {name: {"texts": to how many, "highest": part, "needed": number}}."""

    def per_problem(self) -> np.ndarray:
        """[n]: the share of each problem's samples that are right."""
        return self.correct.reshape(-1, self.samples).mean(1)


def check_graders(names: Sequence[str]) -> None:
    """Raise ValueError if a name is neither in `GRADERS` nor a reward function `file.function`."""
    for name in names:
        if name not in GRADERS and "." not in name:
            raise ValueError(f"graders: {name!r} is not one of {', '.join(GRADERS)}, nor a reward file.function")
        if "." in name:
            rewards.load(name)


def grade(
    rows: Sequence[dict],
    graders: Sequence[str],
    stops: Sequence[str],
    format_reward: str,
    timeout: float,
    threshold: float | None = None,
) -> list[Grades]:
    """Grade the transcripts of one model at one number of shots.

    Args:
        rows: transcripts, as `evaluate.transcribe` makes them.
        graders: keys of `GRADERS`, or reward functions `file.function`, which count as right from `threshold` on.
        stops: entries of `STOPS`.
        format_reward: the function that decides `format_rate`, named like a grader.
        timeout: seconds per call of a reward function.
        threshold: value of a reward function from which a text is right; None: its full value (`rewards.full_value`),
            as it is for the format.

    Returns:
        One `Grades` per stop policy and grader. If a reward function fails on a text, the text counts as wrong and the
        failure is counted in `failures`.

    Raises:
        ValueError: a grader is unknown.
    """
    check_graders((*graders, format_reward))
    problems = [Problem(row["prompt"], row["answer"], row["info"]) for row in rows]
    run_on = np.array([row["stop_tokens"] is not None for row in rows])
    ended = np.array([row["ended"] == "eos" for row in rows])
    tokens = np.array([row["tokens"] for row in rows])
    tokens_cut = np.array([row["stop_tokens"] or row["tokens"] for row in rows])
    reward_names = dict.fromkeys(name for name in (format_reward, *graders) if name not in GRADERS)
    needed = {name: rewards.full_value(name) for name in reward_names}
    if threshold is not None:
        needed |= {name: threshold for name in graders if name in reward_names}
    numbers = any(one_number(answer) is not None for answer in {row["answer"] for row in rows})
    graded = []
    with RewardRunner(tuple(reward_names), timeout) as runner:
        for stop in stops:
            stopped = stop == "stop_string"
            texts = [cut(row) if stopped else row["completion"] for row in rows]
            scores = dict(zip(runner.names, runner.score(texts, problems), strict=True))
            failed = {name: _failure(scores[name], runner, name) for name in reward_names if None in scores[name]}
            pairs = list(zip(texts, problems, strict=True))
            read = {name: [read_one(*pair) for pair in pairs] for name, read_one in GRADERS.items()}
            read |= {name: [(None, reaches(score, needed[name])) for score in scores[name]] for name in reward_names}
            partial = {name: found for name in reward_names if (found := _partial(scores[name], needed[name]))}
            for grader in graders:
                graded.append(
                    Grades(
                        model=rows[0]["model"],
                        shots=rows[0]["shots"],
                        stop=stop,
                        grader=grader,
                        values=[value for value, _ in read[grader]],
                        correct=np.array([right for _, right in read[grader]]),
                        lenient=np.array([right for _, right in read["last_number"]]),
                        numbers=numbers,
                        formatted=np.array([right for _, right in read[format_reward]]),
                        finished=ended | run_on if stopped else ended,
                        run_on=run_on,
                        tokens=tokens_cut if stopped else tokens,
                        samples=1 + max(row["sample"] for row in rows),
                        failures={name: failed[name] for name in (grader, format_reward) if name in failed},
                        partial={name: partial[name] for name in (grader, format_reward) if name in partial},
                    )
                )
    return graded


def _failure(scores: Sequence[float | None], runner: RewardRunner, name: str) -> dict:
    """On how many texts a reward function failed, and how on the first."""
    return {"texts": scores.count(None), "first": runner.first_errors[name]}


def _partial(scores: Sequence[float | None], needed: float) -> dict | None:
    """How many texts got more than nothing and too little to count; None if there is none."""
    parts = [score for score in scores if score and score > 0 and not reaches(score, needed)]
    return {"texts": len(parts), "highest": max(parts), "needed": needed} if parts else None


def cut(row: dict) -> str:
    """The text of a transcript before its first stop string."""
    text = row["completion"]
    return text[: min((at for stop in row["stop"] if (at := text.find(stop)) >= 0), default=len(text))]


def cell(grades: Grades) -> dict:
    """The rates of one model, number of shots, stop policy and grader, as they stand in `eval.json`.

    With one sample per problem the interval is Wilson's; with k, the bootstrap's over problems, `correct` counts
    samples, and `pass_at` (1, 2, 4, ... and k) and `majority` (null for a reward, which reads no value) are there too.
    `failures` and `partial`, as `Grades` has them, are there if a reward function failed, or paid for a part. The
    lenient accuracy is null where no gold is a number.
    """
    k, per_problem = grades.samples, grades.per_problem()
    lenient = grades.lenient.reshape(-1, k).mean(1)
    n, correct = len(per_problem), int(grades.correct.sum())
    result = {
        "model": grades.model,
        "shots": grades.shots,
        "stop": grades.stop,
        "grader": grades.grader,
        "n": n,
        "correct": correct,
        "accuracy": float(per_problem.mean()),
        "ci95": wilson(correct, n) if k == 1 else mean_interval(per_problem, 0, 1),
        "lenient_accuracy": None,
        "lenient_ci95": None,
        "format_rate": float(grades.formatted.mean()),
        "finished": float(grades.finished.mean()),
        "run_on": float(grades.run_on.mean()),
        "mean_tokens": float(grades.tokens.mean()),
    }
    if grades.numbers:
        result["lenient_accuracy"] = float(grades.lenient.mean())
        result["lenient_ci95"] = wilson(int(grades.lenient.sum()), n) if k == 1 else mean_interval(lenient, 0, 1)
    if k > 1:
        counts = grades.correct.reshape(-1, k).sum(1)
        sizes = sorted({k, *(2**i for i in range(k.bit_length()))})
        estimates = {size: [pass_at_k(k, int(c), size) for c in counts] for size in sizes}
        votes = [majority(grades.values[i : i + k], grades.correct[i : i + k].tolist()) for i in range(0, n * k, k)]
        result |= {
            "samples": k,
            "pass_at": {str(size): _with_interval(values) for size, values in estimates.items()},
            "majority": _with_interval(votes) if grades.grader in GRADERS else None,
        }
    result |= {"failures": grades.failures} if grades.failures else {}
    return result | ({"partial": grades.partial} if grades.partial else {})


def paired(base: Grades, tuned: Grades) -> dict:
    """Compare base and tuned on the same problems: a bootstrap interval of the difference, and the exact McNemar test.

    The test is for single answers. With several samples per problem it is left out, and `p_value` is null.
    """
    assert (base.shots, base.stop, base.grader) == (tuned.shots, tuned.stop, tuned.grader)
    assert len(base.per_problem()) == len(tuned.per_problem()), "not the same problems"
    difference = tuned.per_problem() - base.per_problem()
    result = {"shots": base.shots, "stop": base.stop, "grader": base.grader, "n": len(difference)}
    p_value = None
    if base.samples == tuned.samples == 1:
        only_base, only_tuned = int((difference < 0).sum()), int((difference > 0).sum())
        both = int((base.correct & tuned.correct).sum())
        neither = len(difference) - both - only_base - only_tuned
        result |= {"both": both, "only_base": only_base, "only_tuned": only_tuned, "neither": neither}
        p_value = mcnemar(only_base, only_tuned)
    return result | {
        "difference": float(difference.mean()),
        "ci95": mean_interval(difference, -1, 1),
        "p_value": p_value,
    }


def split(shots: int, gain: Callable[[str, str], np.ndarray]) -> dict:
    """Split the gain that the published evaluation measures into three parts.

    Let D(g, s) be the gain under grader g and stop policy s. Then total = D(published, eos) is the sum of:

    - stopping = D(published, eos) - D(published, stop_string): the gain from not running on;
    - grader = D(published, stop_string) - D(last_number, stop_string): the gain from what that grader misreads;
    - left = D(last_number, stop_string): the gain from better answers.

    Args:
        shots: number of worked examples, stored in the result.
        gain: (grader, stop) -> [n], tuned minus base for each problem.

    Returns:
        {"shots", each part as a mean over problems, "ci95": {part: [low, high]}}.
    """
    run_on, stopped = gain("published", "eos"), gain("published", "stop_string")
    left = gain("last_number", "stop_string")
    return _parts(shots, total=run_on, stopping=run_on - stopped, grader=stopped - left, left=left)


def format_split(shots: int, gain: Callable[[str, str], np.ndarray]) -> dict:
    """Split the gain in the training reward into format and better answers.

    total = D(marker, stop_string) = format + left, with left = D(last_number, stop_string). Arguments and result are as
    in `split`.
    """
    total, left = gain("marker", "stop_string"), gain("last_number", "stop_string")
    return _parts(shots, total=total, format=total - left, left=left)


def _parts(shots: int, **parts: np.ndarray) -> dict:
    means = {name: float(values.mean()) for name, values in parts.items()}
    # `total` and `left` are gains, at most 1 per problem. The other parts are differences of two gains, at most 2.
    most = {name: 1 if name in ("total", "left") else 2 for name in parts}
    intervals = {name: mean_interval(values, -most[name], most[name]) for name, values in parts.items()}
    return {"shots": shots, **means, "ci95": intervals}


def _with_interval(values: Sequence[float]) -> dict:
    return {"value": float(np.mean(values)), "ci95": mean_interval(values, 0, 1)}


def summarize(graded: Sequence[Grades]) -> dict:
    """The content of `eval.json`: cells and, if both models are there, paired differences and the splits of the gain.

    Base comes before tuned and few shots before many, whatever the order of `graded`. Where golds are numbers,
    `last_number` is compared whether it was asked for or not, since every cell has read it. `gsm8k.correctness` is
    `marker` by another name.
    """
    graded = sorted(graded, key=lambda grades: (grades.model, grades.shots))
    result: dict = {"cells": [cell(grades) for grades in graded]}
    by_key = {(g.model, g.shots, g.stop, g.grader): g for g in graded}
    for g in (g for g in graded if g.numbers):
        read = replace(g, grader="last_number", correct=g.lenient)
        by_key.setdefault((g.model, g.shots, g.stop, "last_number"), read)
    pairs = [(g, by_key.get(("tuned", *key[1:]))) for key, g in by_key.items() if key[0] == "base"]
    pairs.sort(key=lambda pair: pair[0].shots)
    result["paired"] = [paired(base, tuned) for base, tuned in pairs if tuned is not None]
    for g in graded:
        if g.grader == "gsm8k.correctness":
            by_key.setdefault((g.model, g.shots, g.stop, "marker"), g)

    def gain(shots: int) -> Callable[[str, str], np.ndarray]:
        def of(grader: str, stop: str) -> np.ndarray:
            base, tuned = (by_key[model, shots, stop, grader] for model in ("base", "tuned"))
            return tuned.per_problem() - base.per_problem()

        return of

    for name, compute in (("split", split), ("format", format_split)):
        result[name] = []
        for shots in sorted({g.shots for g in graded}):
            try:
                result[name].append(compute(shots, gain(shots)))
            except KeyError:
                continue  # a grader, a stop policy or a model that this split needs was not asked for
    return result
