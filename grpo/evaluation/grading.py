"""From transcripts to numbers: accuracies, paired differences, and where a gain comes from. This needs no model.

The same texts are graded by each grader under two stop policies. `eos` keeps the text after the first stop string
(the run-on), and `stop_string` cuts it off. This separates three sources of a gain: learning to stop, what the grader
misreads, and better answers. A cell is the result of one model, number of shots, stop policy and grader. Left out:
making the transcripts (`transcribe.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import rewards
from data.problem import Problem
from grpo.evaluation.graders import ALSO_CALLED, GRADERS, Graded, reaches
from grpo.evaluation.protocol import EvalOptions
from grpo.evaluation.statistics import majority, mcnemar, mean_interval, pass_at_k, wilson
from rewards.gsm8k import one_number
from rewards.runner import RewardRunner

STOPS = ("stop_string", "eos")
Gains = dict[tuple[str, str], np.ndarray]
"""(grader, stop policy) -> [n], the gain on each problem: tuned minus base."""


@dataclass
class Grades:
    """One model's graded answers, k to each of n problems, under one number of shots, stop policy and grader."""

    cell: dict
    """The rates, as they stand in `eval.json`."""
    right: np.ndarray
    """[n, k] bool."""
    lenient: tuple[str, np.ndarray] | None
    """The lenient grader, and [n, k] bool: right as it reads the same text; None if it says nothing here."""


def check_graders(names: Sequence[str]) -> None:
    """Raise ValueError if a name is neither in `GRADERS` nor a reward function `file.function` that can grade."""
    for name in names:
        if name not in GRADERS and "." not in name:
            raise ValueError(f"graders: {name!r} is not one of {', '.join(GRADERS)}, nor a reward file.function")
        if "." in name and "tokens" in rewards.asks_for(rewards.load(name)):
            raise ValueError(f"graders: {name!r} asks for 'tokens', and an evaluation keeps only their number")


def grade(rows: Sequence[dict], options: EvalOptions) -> list[Grades]:
    """Grade the transcripts of one model at one number of shots.

    Args:
        rows: transcripts, as `transcribe` makes them: the k samples of a problem are adjacent.
        options: says which graders, and how.

    Returns:
        One `Grades` per stop policy and grader. Texts that were ended at the stop string have one stop policy only, and
        so have those of data without stop strings.

    Raises:
        ValueError: a grader is unknown.
    """
    names = graders_of(options)
    check_graders(names)
    reward_names = [name for name in names if name not in GRADERS]
    stops = STOPS[:1] if rows[0]["stop_early"] or not rows[0]["stop"] else STOPS
    graded = []
    how = {"reasoning_end": options.reasoning_end, "chat": options.chat}
    with RewardRunner(reward_names, options.timeout, options.reward_workers, **how) as runner:
        for stop in stops:
            graded += _grade(rows, stop, options, runner)
    return graded


def graders_of(options: EvalOptions) -> list[str]:
    """Every grader that an evaluation uses, each once."""
    used = dict.fromkeys((options.format, *options.graders, options.lenient))
    return [name for name in used if name is not None]


def _grade(rows: Sequence[dict], stop: str, options: EvalOptions, runner: RewardRunner) -> list[Grades]:
    """As `grade`, under one stop policy.

    In a cell, `correct` counts samples. `failures` and `partial` are there if a reward function failed, or paid for a
    part. The lenient accuracy is null without a lenient grader, or if that reads numbers and no gold is one. The rate
    of the format is null without a format.
    """
    read, troubles = _read(rows, stop, options, runner)
    k = 1 + max(row["sample"] for row in rows)
    right = {name: np.array([is_right for _, is_right in pairs]).reshape(-1, k) for name, pairs in read.items()}
    numbers = any(one_number(answer) is not None for answer in {row["answer"] for row in rows})
    reads = options.lenient is not None and (numbers or options.lenient not in GRADERS)
    lenient, lenient_ci95 = _rate(right[options.lenient]) if reads else (None, None)
    ends = _ends(rows, stop)
    graded = []
    for grader in options.graders:
        accuracy, ci95 = _rate(right[grader])
        cell = {
            "model": rows[0]["model"],
            "shots": rows[0]["shots"],
            "stop": stop,
            "grader": grader,
            "n": len(right[grader]),
            "correct": int(right[grader].sum()),
            "accuracy": accuracy,
            "ci95": ci95,
            "lenient_accuracy": lenient,
            "lenient_ci95": lenient_ci95,
            "format_rate": None if options.format is None else float(right[options.format].mean()),
            **ends,
        }
        if k > 1:
            cell |= _of_samples(read[grader], right[grader], votes=grader in GRADERS)
        for kind, found in troubles.items():
            if here := {name: found[name] for name in (grader, options.format) if name in found}:
                cell[kind] = here
        graded.append(Grades(cell, right[grader], (options.lenient, right[options.lenient]) if reads else None))
    return graded


def _read(
    rows: Sequence[dict], stop: str, options: EvalOptions, runner: RewardRunner
) -> tuple[dict[str, list[Graded]], dict[str, dict]]:
    """What each grader reads in each text, and what was wrong with the reward functions among them.

    If a reward function fails on a text, the text counts as wrong. Partial credit does not count either.
    """
    problems = [Problem(row["prompt"], row["answer"], row["info"]) for row in rows]
    texts = [cut(row) if stop == "stop_string" else row["completion"] for row in rows]
    answers = [rewards.after_reasoning(text, options.reasoning_end) for text in texts]
    read = {name: list(map(GRADERS[name], answers, problems)) for name in graders_of(options) if name in GRADERS}
    failures, partial = {}, {}
    told = _told(rows, stop)
    if options.regrade is None:  # else the transcripts do not say
        told["cap"] = [options.budget] * len(rows)
    for name, scores in zip(runner.names, runner.score(texts, problems, told), strict=True):
        needed = rewards.full_value(name)
        if options.threshold is not None and name in options.graders:
            needed = options.threshold
        read[name] = [(None, reaches(score, needed)) for score in scores]
        if None in scores:
            failures[name] = {"texts": scores.count(None), "first": runner.first_errors[name]}
        parts = [score for score in scores if score and score > 0 and not reaches(score, needed)]
        if parts:
            partial[name] = {"texts": len(parts), "highest": max(parts), "needed": needed}
    return read, {"failures": failures, "partial": partial}


def cut(row: dict) -> str:
    """The text of a transcript before its first stop string."""
    text = row["completion"]
    return text[: min((at for stop in row["stop"] if (at := text.find(stop)) >= 0), default=len(text))]


def _told(rows: Sequence[dict], stop: str) -> dict[str, list]:
    """What a reward may ask for (`rewards.TOLD`), of the texts under one stop policy; token ids are not kept."""
    run_on = [row["stop_tokens"] is not None for row in rows]
    finished = [row["ended"] == "eos" for row in rows]
    lengths = [row["tokens"] for row in rows]
    if stop == "stop_string":
        finished = [one or other for one, other in zip(finished, run_on, strict=True)]
        lengths = [row["stop_tokens"] or row["tokens"] for row in rows]
    return {"length": lengths, "finished": finished}


def _ends(rows: Sequence[dict], stop: str) -> dict:
    """How the texts end: `finished` by EOS or a stop string that counts, `run_on` if they contain a stop string."""
    told = _told(rows, stop)
    return {
        "finished": float(np.mean(told["finished"])),
        "run_on": float(np.mean([row["stop_tokens"] is not None for row in rows])),
        "mean_tokens": float(np.mean(told["length"])),
    }


def _rate(right: np.ndarray) -> tuple[float, list[float]]:
    """An accuracy and its interval: Wilson's for single answers; with several, the bootstrap's over problems."""
    shares = right.mean(1)
    interval = wilson(int(right.sum()), len(right)) if right.shape[1] == 1 else mean_interval(shares, 0, 1)
    return float(shares.mean()), interval


def _of_samples(read: Sequence[Graded], right: np.ndarray, votes: bool) -> dict:
    """pass@1, 2, 4, ... and k, and the majority vote; none for a reward, which reads no value."""
    n, k = right.shape
    counts = right.sum(1).tolist()
    sizes = sorted({k, *(2**i for i in range(k.bit_length()))})
    pass_at = {str(size): _with_interval([pass_at_k(k, count, size) for count in counts]) for size in sizes}
    voted = None
    if votes:
        values = [[value for value, _ in read[i * k : (i + 1) * k]] for i in range(n)]
        voted = _with_interval([majority(*pair) for pair in zip(values, right.tolist(), strict=True)])
    return {"samples": k, "pass_at": pass_at, "majority": voted}


def _with_interval(values: Sequence[float]) -> dict:
    return {"value": float(np.mean(values)), "ci95": mean_interval(values, 0, 1)}


def summarize(graded: Sequence[Grades]) -> dict:
    """The content of `eval.json`: cells and, if both models are there, paired differences and the splits of the gain.

    Base comes before tuned and few shots before many, whatever the order of `graded`. The lenient grader is compared
    whether it was asked for or not, since every text was read by it.
    """
    graded = sorted(graded, key=lambda grades: (grades.cell["model"], grades.cell["shots"]))
    right = {key_of(grades.cell): grades.right for grades in graded}
    lenient = None
    for grades in graded:
        if grades.lenient is not None:
            lenient, as_it_reads = grades.lenient
            right.setdefault((*key_of(grades.cell)[:3], lenient), as_it_reads)
    keys = [key for model, *key in right if model == "base" and ("tuned", *key) in right]
    cells = [grades.cell for grades in graded]
    result: dict = {"lenient": lenient, "cells": cells, "paired": [], "split": [], "format": []}
    gains: dict[int, Gains] = {}
    for shots, stop, grader in sorted(keys, key=lambda key: key[0]):
        base, tuned = (right[model, shots, stop, grader] for model in ("base", "tuned"))
        result["paired"].append({"shots": shots, "stop": stop, "grader": grader, **paired(base, tuned)})
        gains.setdefault(shots, {})[grader, stop] = tuned.mean(1) - base.mean(1)
    for shots, gain in gains.items():
        for name, other in ALSO_CALLED.items():
            if (name, "stop_string") in gain:
                gain.setdefault((other, "stop_string"), gain[name, "stop_string"])
        if gain.keys() >= {("published", "eos"), ("published", "stop_string"), ("last_number", "stop_string")}:
            result["split"].append(split(shots, gain))
        if gain.keys() >= {("marker", "stop_string"), ("last_number", "stop_string")}:
            result["format"].append(format_split(shots, gain))
    return result


def key_of(cell: dict) -> tuple[str, int, str, str]:
    """What a cell is the result of."""
    return cell["model"], cell["shots"], cell["stop"], cell["grader"]


def paired(base: np.ndarray, tuned: np.ndarray) -> dict:
    """Compare base and tuned on the same problems: a bootstrap interval of the difference, and the exact McNemar test.

    The test is for single answers. With several samples per problem it is left out, and `p_value` is null.

    Args:
        base, tuned: [n, k] bool, which answers are right.
    """
    assert len(base) == len(tuned), "not the same problems"
    difference = tuned.mean(1) - base.mean(1)
    result, p_value = {"n": len(difference)}, None
    if base.shape[1] == tuned.shape[1] == 1:
        result |= {
            "both": int((base & tuned).sum()),
            "only_base": int((base & ~tuned).sum()),
            "only_tuned": int((~base & tuned).sum()),
            "neither": int((~base & ~tuned).sum()),
        }
        p_value = mcnemar(result["only_base"], result["only_tuned"])
    interval = mean_interval(difference, -1, 1)
    return result | {"difference": float(difference.mean()), "ci95": interval, "p_value": p_value}


def split(shots: int, gain: Gains) -> dict:
    """Split the gain that the published evaluation measures into three parts.

    Let D(g, s) be the gain under grader g and stop policy s. Then total = D(published, eos) is the sum of:

    - stopping = D(published, eos) - D(published, stop_string): the gain from not running on;
    - grader = D(published, stop_string) - D(last_number, stop_string): the gain from what that grader misreads;
    - left = D(last_number, stop_string): the gain from better answers.

    Returns:
        {"shots", each part as a mean over problems, "ci95": {part: [low, high]}}.
    """
    run_on, stopped = gain["published", "eos"], gain["published", "stop_string"]
    left = gain["last_number", "stop_string"]
    return _parts(shots, total=run_on, stopping=run_on - stopped, grader=stopped - left, left=left)


def format_split(shots: int, gain: Gains) -> dict:
    """Split the gain in the training reward into format and better answers, with a result as that of `split`.

    total = D(marker, stop_string) = format + left, with left = D(last_number, stop_string).
    """
    total, left = gain["marker", "stop_string"], gain["last_number", "stop_string"]
    return _parts(shots, total=total, format=total - left, left=left)


def _parts(shots: int, **parts: np.ndarray) -> dict:
    means = {name: float(values.mean()) for name, values in parts.items()}
    # `total` and `left` are gains, at most 1 per problem. The other parts are differences of two gains, at most 2.
    most = {name: 1 if name in ("total", "left") else 2 for name in parts}
    intervals = {name: mean_interval(values, -most[name], most[name]) for name, values in parts.items()}
    return {"shots": shots, **means, "ci95": intervals}
