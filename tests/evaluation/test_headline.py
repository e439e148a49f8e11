"""What is said of an evaluation: which pair counts, what may be claimed, what the table holds, and what failed."""

import json
import re

import numpy as np
import pytest

from grpo.evaluation import headline
from grpo.evaluation.headline import claim, points
from grpo.evaluation.statistics import mcnemar, mean_interval


def cell(model: str, correct: int, **more) -> dict:
    rates = {"accuracy": correct / 100, "ci95": [0.1, 0.2], "lenient_accuracy": 0.5, "lenient_ci95": [0.4, 0.6]}
    more = {"shots": 0, "stop": "stop_string", "grader": "gsm8k.correctness"} | more
    ends = {"format_rate": 0.9, "finished": 1.0, "run_on": 0.0, "mean_tokens": 50.0}
    return {"model": model, "n": 100, "correct": correct, **rates, **ends, **more}


def pair_of(only_base: int, only_tuned: int, n: int, **fields) -> dict:
    values = [-1] * only_base + [1] * only_tuned + [0] * (n - only_base - only_tuned)
    numbers = {"difference": float(np.mean(values)), "ci95": mean_interval(values, -1, 1)}
    key = {"shots": 8, "stop": "stop_string", "grader": "last_number", "n": n}
    return {**key, **numbers, "p_value": mcnemar(only_base, only_tuned), **fields}


WHERE = "(grader last_number, stop stop_string, 8 shots, n = "


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"cells": []}, "lacks 'paired'"),
        ({"cells": [{"model": "base"}], "paired": [], "split": [], "format": []}, "KeyError: 'lenient_accuracy'"),
        ({"cells": {}, "paired": [], "split": [], "format": []}, "cells is {}: must be of type list"),
        ({"cells": [], "paired": [{"shots": 0}], "split": [], "format": []}, "KeyError: 'grader'"),
        ([], "must be a JSON object"),
    ],
)
def test_c62_a_result_of_another_version_is_a_sentence_that_names_file_and_field(tmp_path, content, said):
    """Kind: a file that is read back is taken to be of this version, and another one ends in a traceback."""
    (tmp_path / "eval.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"eval.json.*{re.escape(said)}"):
        headline.table_of(tmp_path / "eval.json")


def test_points_have_no_negative_zero():
    assert (points(0.1234), points(-0.05), points(-0.0001)) == ("+12.3", "-5.0", "+0.0")


def test_a_claim_of_a_gain_names_size_interval_and_test():
    assert claim(pair_of(5, 30, 1319, ci95=[0.14, 0.36], difference=0.25)) == (
        f"The tuned model is better {WHERE}1,319): +25.0 points, 95 % interval +14.0 to +36.0, p < 0.001."
    )
    worse = claim(pair_of(20, 5, 100))
    assert "is worse" in worse and f"p = {mcnemar(20, 5):.2g}." in worse
    several = claim(pair_of(2, 20, 40, p_value=None))  # samples of each problem, without a test
    assert "is better" in several and "p =" not in several


@pytest.mark.parametrize(
    ("counts", "changes", "why"),
    [
        ((10, 14, 100), {"ci95": [-0.06, 0.14]}, "it would have to be larger than about 10.0 points"),
        ((0, 1, 100), {}, "larger than about 1.5 points"),  # the interval begins at 0
        ((5, 30, 100), {"ci95": [-0.01, 0.5]}, "larger than about 25.5 points"),  # the test alone is not enough
        ((0, 4, 5), {}, "too few answers differ to rule out chance"),  # nor is the interval
        ((0, 3, 3), {}, "larger than about 63.2 points"),  # three problems, all alike
        ((0, 0, 100), {}, "larger than about 3.0 points"),  # as large as a difference may be and go unseen
        ((5, 0, 6), {}, "too few answers differ to rule out chance"),  # p = 0.062, and worse
        ((0, 1, 10), {"p_value": None}, "larger than about 15.0 points"),  # several samples, without a test
    ],
)
def test_no_claim_is_made_that_interval_or_test_does_not_back(counts, changes, why):
    pair = pair_of(*counts, **changes)
    said = claim(pair)
    assert said.startswith(f"No difference can be claimed {WHERE}{counts[2]}): measured {points(pair['difference'])}")
    assert said.endswith(f"{why}.")
    assert (", p " in said) == (pair["p_value"] is not None)


def test_the_pair_that_counts_is_by_the_last_number_of_the_cut_text():
    keys = [(stop, grader) for stop in ("stop_string", "eos") for grader in ("last_number", "published")]
    pairs = [pair_of(1, 2, 9, shots=shots, stop=stop, grader=grader) for shots in (0, 8) for stop, grader in keys]
    chosen = headline.main_pairs({"paired": pairs})
    assert [(p["shots"], p["stop"], p["grader"]) for p in chosen] == [
        (0, "stop_string", "last_number"), (8, "stop_string", "last_number")
    ]  # fmt: skip
    (nearest,) = headline.main_pairs({"paired": [pairs[3], pairs[1], pairs[2]]})
    assert (nearest["stop"], nearest["grader"]) == ("stop_string", "published")
    assert headline.main_pairs({"paired": []}) == []


@pytest.mark.parametrize(
    ("asked", "own", "main"),
    [
        (["my.reward"], "my.reward", "my.reward"),
        (["my.reward"], None, "my.reward"),
        (["gsm8k.correctness"], "gsm8k.correctness", "gsm8k.correctness"),
        (["my.reward", "last_number"], None, "my.reward"),
        (["last_number", "my.reward"], "my.reward", "my.reward"),
        (["marker", "published", "last_number"], None, "last_number"),
        (["marker", "published", "last_number"], "gsm8k.correctness", "marker"),
        (["marker", "published", "last_number"], "my.reward", "last_number"),
        (["published"], "my.reward", "published"),
    ],
)
def test_c70_the_sentence_goes_by_the_grader_of_the_run(asked, own, main):
    """The kind: table, sentence and page read different graders, so they say opposite things of one run.

    Siblings: the claim under the table; the page's claim, its facts and its choice of an evaluation
    (tests/report/test_page.py); lenient readings where golds are no numbers (tests/evaluation/test_grading.py).
    """
    keys = [(stop, grader) for stop in ("stop_string", "eos") for grader in dict.fromkeys((*asked, "last_number"))]
    pairs = [pair_of(0, 0, 9, stop=stop, grader=grader, shots=0) for stop, grader in keys]
    found = {"cells": [cell("base", 20, grader=grader) for grader in asked], "paired": pairs}
    (pair,) = headline.main_pairs(found, own)
    assert (headline.main_grader(found, own), pair["grader"], pair["stop"]) == (main, main, "stop_string")


def test_the_lenient_grader_is_the_one_that_the_file_names():
    asked = ["marker", "marker_first", "last_number"]
    found = {"cells": [cell("base", 20, grader=grader) for grader in asked], "paired": []}
    assert headline.main_grader(found) == headline.main_grader(found | {"lenient": "last_number"}) == "last_number"
    assert headline.main_grader(found | {"lenient": "marker_first"}) == "marker_first"
    assert headline.main_grader(found | {"lenient": None}) == "marker"


def test_own_is_at_the_runs_shots_else_the_first():
    entries = [{"shots": 0}, {"shots": 2}]
    assert headline.entry_of_run(entries, {"num_shots": 2}) == {"shots": 2}
    assert headline.entry_of_run(entries, {"num_shots": 7}) == {"shots": 0}
    assert headline.entry_of_run([], {"num_shots": 7}) is None


def test_a_lenient_reading_is_a_grader():
    found = {"cells": [cell("base", 20, samples=2, majority=None), cell("tuned", 40)]}
    shown = headline.readings(found)
    assert [(one["model"], one["grader"], one["accuracy"], one.get("correct")) for one in shown] == [
        *(("base", "gsm8k.correctness", 0.2, 20), ("base", "last_number", 0.5, None)),
        *(("tuned", "gsm8k.correctness", 0.4, 40), ("tuned", "last_number", 0.5, None)),
    ]
    assert headline.accuracies(found, pair_of(0, 0, 9, shots=0)) == (0.5, 0.5)
    assert headline.accuracies(found, pair_of(0, 0, 9, shots=0, grader="gsm8k.correctness")) == (0.2, 0.4)
    both = {"cells": [cell("base", 20), cell("base", 30, grader="last_number")]}
    assert headline.readings(both) == both["cells"]


def test_what_failed_is_said_once_however_many_graders_saw_it():
    failed = {"gsm8k.format": {"texts": 3, "first": "it broke"}}
    cells = [cell("base", 20, failures=failed), cell("base", 20, grader="marker", failures=failed), cell("tuned", 40)]
    assert headline.failures({"cells": cells}) == [
        "gsm8k.format failed on 3 of 100 texts (base, 0 shots, stop_string), which count as wrong; the first: it broke"
    ]


def test_the_table_has_cells_parts_claims_and_failures():
    several = {"samples": 2, "pass_at": {"1": {"value": 0.2, "ci95": [0.1, 0.3]}}}
    several["majority"] = {"value": 0.25, "ci95": [0.2, 0.4]}
    parts = {"shots": 0, "total": 0.4, "stopping": 0.5, "grader": 0.0, "left": -0.1, "ci95": {}}
    form = {"shots": 0, "total": 0.4, "format": 0.1, "left": 0.3, "ci95": {}}
    pair = pair_of(10, 50, 100)
    cells = [cell("base", 20, **several, failures={"a.b": {"texts": 1, "first": "x"}}), cell("tuned", 40)]
    lines = headline.table({"cells": cells, "paired": [pair], "split": [parts], "format": [form]}).splitlines()
    numbers = "100     0.200  0.100 .. 0.200     0.500   0.900     1.000    50.0"
    assert lines[1] == f"base       0  stop_string  gsm8k.correctness  {numbers}"
    rates = "pass@1 0.200 (0.100 .. 0.300)  majority@2 0.250 (0.200 .. 0.400)"
    assert lines[3] == f"base       0  stop_string  gsm8k.correctness {rates}"
    assert lines[4:6] == [
        "gain at 0 shots (published grader, run-on kept) +40.0 points = stopping +50.0 + grader +0.0 + left -10.0",
        "gain at 0 shots (training reward) +40.0 points = format +10.0 + left +30.0",
    ]
    assert lines[6] == claim(pair) and lines[7].startswith("warning: a.b failed on 1 of 200 texts")
