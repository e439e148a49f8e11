"""From transcripts to `eval.json`: stop policies, cells, pairs, the splits, several samples, and what is claimed."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.problem import Task
from grpo.config import Config
from grpo.evaluation import compare, grading, headline, protocol, statistics
from grpo.evaluation.graders import GRADERS
from grpo.evaluation.protocol import EvalOptions
from grpo.evaluation.statistics import mcnemar, mean_interval, wilson
from grpo.files import write_lines
from grpo.options import write_yaml
from rewards import gsm8k

PROMPT = "Question: 6 * 3?\nSolution: Let's think step by step."
NEXT = "\n\nQuestion: 5 and 2?\n#### The final answer is 7"
RIGHT = "\n#### The final answer is 18"
CELL = {"model", "shots", "stop", "grader", "n", "correct", "accuracy", "ci95", "lenient_accuracy", "lenient_ci95"} | {
    *("format_rate", "finished", "run_on", "mean_tokens"),
}
COUNTS = {"both", "only_base", "only_tuned", "neither"}
PAIR = {"shots", "stop", "grader", "n", "difference", "ci95", "p_value"}


def row(completion, *, ended="eos", answer="18", stop=("\n\nQuestion:",), model="base", early=False, **place):
    """A transcript of a model whose tokens are characters."""
    ends = [at + len(string) for string in stop if (at := completion.find(string)) >= 0]
    return {
        **{"model": model, "shots": 0, "index": 0, "sample": 0, "question": "6 * 3?", "prompt": PROMPT, "info": {}},
        **{"answer": answer, "stop": list(stop), "stop_early": early, "completion": completion, "ended": ended},
        **{"tokens": len(completion) + (ended == "eos"), "stop_tokens": min(ends, default=None)},
        **place,
    }


def rows_of(completions, samples=1, **fields):
    return [row(text, index=i // samples, sample=i % samples, **fields) for i, text in enumerate(completions)]


def grade(rows, graders=Task.graders, format="marker", **options):
    """Graded without a process for rewards where the format is a grader."""
    return grading.grade(rows, EvalOptions(model="m", graders=graders, format=format, **options))


def cells_of(*arguments, **options):
    return [grades.cell for grades in grade(*arguments, **options)]


def test_without_a_stop_string_there_is_one_stop_policy():
    assert [cell["stop"] for cell in cells_of(rows_of([RIGHT]), ("last_number",))] == ["stop_string", "eos"]
    assert [cell["stop"] for cell in cells_of(rows_of([RIGHT], stop=()), ("last_number",))] == ["stop_string"]


def test_several_workers_grade_the_same_and_name_the_same_first_failure(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import time\n\ndef number(completion, problem):\n    time.sleep(0.3 * (completion == 'slow'))\n"
        "    return float(completion)\n"
    )
    own, start, started = f"{tmp_path}/own.py:number", grading.RewardRunner.__init__, []
    monkeypatch.setattr(
        grading.RewardRunner, "__init__", lambda *a, **k: started.append(start(*a, **k) or len(a[0]._workers))
    )
    rows = rows_of(["slow", "fast", "1", "0.5", "1", "0", "1"], early=True)
    one, two = (cells_of(rows, (own,), None, lenient=None, reward_workers=workers) for workers in (1, 2))
    assert one == two and one[0]["correct"] == 3 and "'slow'" in json.dumps(one[0]["failures"]) and started == [1, 2]


def by_key(cells):
    return {(cell["model"], cell["shots"], cell["stop"], cell["grader"]): cell for cell in cells}


def summary(base, tuned, samples=1, early=False, **options):
    graded = []
    for model, texts in (("base", base), ("tuned", tuned)):
        graded += grade(rows_of(texts, samples, model=model, early=early), **options)
    return grading.summarize(graded)


@pytest.fixture
def scored(monkeypatch):
    """Let reward functions give these values instead: {name: {text: value}}."""

    def by(values: dict[str, dict[str, float | None]]) -> None:
        def score(runner, texts, problems, told):
            runner.first_errors = dict.fromkeys(runner.names, "no number")
            return [[values[name][text] for text in texts] for name in runner.names]

        monkeypatch.setattr(grading.RewardRunner, "score", score)

    return by


@pytest.mark.parametrize(
    ("completion", "stop", "expected"),
    [
        ("a 18", ("\n\nQuestion:",), "a 18"),
        ("a\n\nQuestion: b\n\nQuestion: c", ("\n\nQuestion:",), "a"),
        ("a\nQuestion:", ("\n\nQuestion:",), "a\nQuestion:"),
        ("a\n\n\nQuestion:", ("\n\nQuestion:",), "a\n"),
        ("\n\nQuestion:", ("\n\nQuestion:",), ""),
        ("a STOP b END", ("END", "STOP"), "a "),
        ("a ab", ("b", "ab"), "a "),
        ("a", (), "a"),
    ],
)
def test_a_text_is_cut_exactly_at_its_first_stop_string(completion, stop, expected):
    assert grading.cut(row(completion, stop=stop)) == expected


def test_a_reward_is_told_how_a_text_ended_under_each_stop_policy():
    """One ran on to the limit, one ended by itself, one was cut; 128 tokens before the budget soft_overlong is full."""
    rows = rows_of([RIGHT + NEXT, "x" * 71, "x" * 72], ended="limit")
    rows[1]["ended"] = "eos"
    cells = by_key(cells_of(rows, graders=("length.stop_properly", "length.soft_overlong"), budget=200))
    counts = {(stop, grader[7:]): cell["correct"] for (_, _, stop, grader), cell in cells.items()}
    assert counts["stop_string", "stop_properly"] == 2 and counts["eos", "stop_properly"] == 1
    assert counts["stop_string", "soft_overlong"] == 3 and counts["eos", "soft_overlong"] == 2
    with pytest.raises(ValueError, match=r"graders: 'length\.repetition' asks for 'tokens', and an evaluation keeps"):
        grading.check_graders(["length.repetition"])


def test_each_stop_policy_grades_its_own_text_and_counts_its_own_tokens():
    rows = rows_of([RIGHT + NEXT, RIGHT + NEXT, " 20", "\n#### 18"], ended="limit")
    rows[1]["ended"] = rows[3]["ended"] = "eos"
    rows[1]["tokens"] += 1
    cells = by_key(cells_of(rows))
    stopped, run_on = cells["base", 0, "stop_string", "last_number"], cells["base", 0, "eos", "last_number"]
    until_stop, all_of_it = len(RIGHT + "\n\nQuestion:"), len(RIGHT + NEXT)
    assert (stopped["correct"], run_on["correct"]) == (3, 1)
    assert (stopped["finished"], run_on["finished"]) == (0.75, 0.5)
    assert (stopped["run_on"], run_on["run_on"]) == (0.5, 0.5)
    assert stopped["mean_tokens"] == (2 * until_stop + 3 + 8) / 4
    assert run_on["mean_tokens"] == (2 * all_of_it + 1 + 3 + 8) / 4
    assert cells["base", 0, "stop_string", "published"]["correct"] == 3
    assert cells["base", 0, "eos", "published"]["correct"] == 1
    assert cells["base", 0, "eos", "lm_eval_strict"]["correct"] == 1  # bare `#### 18` only
    assert cells["base", 0, "eos", "marker_first"]["correct"] == 3  # the first marker comes before the run-on


def test_a_text_that_ended_early_is_graded_as_it_is_and_says_nothing_of_run_on_text():
    (cell,) = cells_of([row(RIGHT, ended="stop", early=True) | {"stop_tokens": 40, "tokens": 40}], ("marker",))
    assert (cell["stop"], cell["correct"], cell["finished"], cell["run_on"]) == ("stop_string", 1, 1.0, 1.0)
    assert cell["mean_tokens"] == 40.0


def test_c42_a_cell_has_the_fields_of_eval_json():
    cells = cells_of(rows_of([RIGHT, " 18", " 20", RIGHT + NEXT], shots=2), ("marker", "last_number"), "gsm8k.format")
    assert [(cell["stop"], cell["grader"]) for cell in cells] == [
        *(("stop_string", "marker"), ("stop_string", "last_number"), ("eos", "marker"), ("eos", "last_number")),
    ]
    strict, lenient = cells[:2]
    assert strict.keys() == CELL
    assert (strict["model"], strict["shots"], strict["n"], strict["correct"], strict["accuracy"]) == (
        *("base", 2, 4, 2, 0.5),
    )
    assert strict["ci95"] == wilson(2, 4)
    assert strict["format_rate"] == 0.5
    assert (strict["lenient_accuracy"], strict["lenient_ci95"]) == (lenient["accuracy"], lenient["ci95"])
    assert (lenient["correct"], lenient["ci95"]) == (3, wilson(3, 4))
    assert cells[2]["format_rate"] == 0.25  # the run-on brings a second answer line
    json.dumps(cells)


def test_a_reward_function_grades_as_its_grader_does_and_reads_no_value():
    rows = rows_of([RIGHT, " 18", RIGHT + NEXT, " 20"], samples=2, early=True)
    reward, marker = grade(rows, ("gsm8k.correctness", "marker"), "gsm8k.format")
    assert reward.right.tolist() == marker.right.tolist() == [[True, False], [True, False]]
    assert reward.cell["format_rate"] == 0.5
    assert reward.cell["pass_at"] == marker.cell["pass_at"]
    assert reward.cell["majority"] is None and marker.cell["majority"]["value"] == 1.0


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("marker", "nearly"), "'nearly' is not one of " + ", ".join(GRADERS)),
        (("gsm8k.nearly",), re.escape("'gsm8k.nearly' is not one of ") + ".*gsm8k.correctness"),
    ],
)
def test_an_unknown_grader_or_format_is_refused_with_the_known_ones(names, said):
    with pytest.raises(ValueError, match=said):
        grade(rows_of([RIGHT]), names)
    with pytest.raises(ValueError, match=said):
        grade(rows_of([RIGHT]), format=names[-1])


def test_a_pair_counts_problems_by_who_has_them_right():
    base = [" 18", " 18", " 20", " 20", " 20", " 20", " 20"]
    tuned = [" 18", " 20", " 18", " 18", " 18", " 18", " 20"]
    (pair,) = summary(base, tuned, graders=("last_number",), early=True)["paired"]
    assert pair.keys() == PAIR | COUNTS
    assert (pair["shots"], pair["stop"], pair["grader"], pair["n"]) == (0, "stop_string", "last_number", 7)
    assert (pair["both"], pair["only_base"], pair["only_tuned"], pair["neither"]) == (1, 1, 4, 1)
    assert pair["difference"] == pytest.approx(3 / 7)
    assert pair["p_value"] == pytest.approx(12 / 32)  # 2 * (1 + 5) / 2**5
    assert pair["ci95"] == mean_interval([0, -1, 1, 1, 1, 1, 0], -1, 1)


@pytest.fixture(scope="module")
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 50)
        yield


TEXTS = st.sampled_from([RIGHT, RIGHT + NEXT, " 18", " 18" + NEXT, "\n#### 20", " 20" + NEXT, " 7", "", " 3", NEXT])


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12))
def test_pairs_and_splits_add_up(few_resamples, pairs):
    base, tuned = zip(*pairs, strict=True)
    result = summary(base, tuned)
    cells, n = by_key(result["cells"]), len(pairs)
    assert len(result["paired"]) == len(Task.graders) * 2
    for pair in result["paired"]:
        of = {model: cells[model, 0, pair["stop"], pair["grader"]] for model in ("base", "tuned")}
        assert sum(pair[name] for name in COUNTS) == pair["n"] == n
        assert pair["both"] + pair["only_base"] == of["base"]["correct"]
        assert pair["both"] + pair["only_tuned"] == of["tuned"]["correct"]
        assert pair["difference"] == pytest.approx(of["tuned"]["accuracy"] - of["base"]["accuracy"], abs=1e-12)
        assert pair["p_value"] == mcnemar(pair["only_base"], pair["only_tuned"])

    def D(grader, stop):
        return (cells["tuned", 0, stop, grader]["correct"] - cells["base", 0, stop, grader]["correct"]) / n

    (split,), (form,) = result["split"], result["format"]
    left = D("last_number", "stop_string")
    expected = {
        "total": D("published", "eos"),
        "stopping": D("published", "eos") - D("published", "stop_string"),
        "grader": D("published", "stop_string") - left,
        "left": left,
    }
    assert {name: split[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert split["total"] == pytest.approx(split["stopping"] + split["grader"] + split["left"], abs=1e-12)
    total = D("marker", "stop_string")
    expected = {"total": total, "format": total - left, "left": left}
    assert {name: form[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    for parts in (split, form):
        assert parts.keys() == {"shots", "ci95", *parts["ci95"]}
        for name, (low, high) in parts["ci95"].items():
            assert low - 1e-12 <= parts[name] <= high + 1e-12


SPLIT, FORM = ("total", "stopping", "grader", "left"), ("total", "format", "left")


@pytest.mark.parametrize(
    ("base", "tuned", "split", "form"),
    [
        ([" 18" + NEXT] * 6 + [" 20"] * 4, [" 18"] * 6 + [" 20"] * 4, (0.6, 0.6, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ([" 18"] * 5 + [" 20"] * 5, [RIGHT] * 5 + [" 20"] * 5, (0.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.0)),
        ([" 20"] * 8 + [RIGHT] * 2, [RIGHT] * 10, (0.8, 0.0, 0.0, 0.8), (0.8, 0.0, 0.8)),
        ([" 18.0", " 18.0"], [" 18", " 20"], (0.5, 0.0, 1.0, -0.5), (0.0, 0.5, -0.5)),
    ],
    ids=["learned to stop", "learned the format", "got better", "was misread by the published grader"],
)
def test_a_gain_is_found_in_the_part_that_made_it(base, tuned, split, form):
    result = summary(base, tuned)
    assert tuple(result["split"][0][name] for name in SPLIT) == split
    assert tuple(result["format"][0][name] for name in FORM) == form


def test_where_no_problem_differs_the_part_of_a_split_may_still_be_as_large_as_goes_unseen():
    (split,) = summary([" 18" + NEXT] * 6 + [" 20"] * 4, [" 18"] * 6 + [" 20"] * 4)["split"]
    unseen = 1 - 0.05 ** (1 / 10)
    assert split["ci95"]["left"] == pytest.approx([-unseen, unseen])
    assert split["ci95"]["grader"] == pytest.approx([-2 * unseen, 2 * unseen])
    assert split["ci95"]["stopping"][0] > 0


@pytest.mark.parametrize(
    ("graders", "early", "splits"),
    [
        (("published", "last_number"), False, (1, 0)),
        (("published", "last_number"), True, (0, 0)),
        (("marker", "last_number"), True, (0, 1)),
        (("marker",), False, (0, 1)),  # every text is read by its last number too
        (("gsm8k.correctness",), True, (0, 1)),  # the marker by another name
        (("published",), False, (1, 0)),
        (("lm_eval_strict",), False, (0, 0)),
    ],
)
def test_a_split_is_there_where_its_gradings_are(graders, early, splits):
    result = summary([" 18"], [RIGHT], graders=graders, early=early)
    assert (len(result["split"]), len(result["format"])) == splits
    stops = ("stop_string",) if early else grading.STOPS
    assert {(pair["stop"], pair["grader"]) for pair in result["paired"]} == {
        (stop, grader) for stop in stops for grader in (*graders, "last_number")
    }
    assert {cell["grader"] for cell in result["cells"]} == set(graders)
    for form in result["format"]:
        assert (form["total"], form["format"], form["left"]) == (1.0, 1.0, 0.0)


def test_a_reward_that_fails_is_counted_with_its_first_reason(scored):
    scored({"gsm8k.format": {RIGHT: 1.0, " 20": None}, "gsm8k.correctness": {RIGHT: 1.0, " 20": 1.0}})
    rows = rows_of([RIGHT, " 20", " 20"], early=True)
    cells = cells_of(rows, ("gsm8k.correctness", "marker"), "gsm8k.format")
    assert [one["failures"] for one in cells] == [{"gsm8k.format": {"texts": 2, "first": "no number"}}] * 2
    assert cells[0]["format_rate"] == pytest.approx(1 / 3) and cells[0]["correct"] == 3


@pytest.mark.parametrize(
    ("full", "threshold", "right", "partial"),
    [
        (None, None, 1, {"texts": 3, "highest": 0.5, "needed": 1.0}),
        (None, 0.5, 2, {"texts": 2, "highest": 0.05, "needed": 0.5}),
        (2.0, None, 0, {"texts": 4, "highest": 1.0 - 1e-9, "needed": 2.0}),
        (0.05, None, 4, None),
    ],
)
def test_c71_partial_credit_is_not_right(monkeypatch, scored, full, threshold, right, partial):
    """The kind: any value above 0 counts as success, so a credit of 0.05 makes an accuracy of 0.9.

    Siblings: accuracy, pass@k, pairs, the format rate, the doctor's probes (tests/doctor/test_check_graders.py).
    """
    values = {RIGHT: 1.0 - 1e-9, " 20": 0.05, " 7": 0.5, "": 0.05, " 3": 0.0}
    forms = dict(zip(values, (0.5, 0.5, 0.5, 0.25, 0.0), strict=True))
    scored({"gsm8k.correctness": values, "gsm8k.format": forms})
    if full is not None:
        monkeypatch.setattr(gsm8k.correctness, "full_value", full, raising=False)
    rows = rows_of(values, early=True)
    (cell,) = cells_of(rows, ("gsm8k.correctness",), "gsm8k.format", threshold=threshold)
    assert (cell["correct"], cell["accuracy"], cell["format_rate"]) == (right, right / 5, 3 / 5)
    parts = {"gsm8k.format": {"texts": 1, "highest": 0.25, "needed": 0.5}}
    assert cell["partial"] == parts | ({"gsm8k.correctness": partial} if partial else {})
    said = headline.failures({"cells": [cell]})
    assert ("gsm8k.correctness gave" in " ".join(said)) == bool(partial)
    begins = "gsm8k.format gave 1 of 5 texts (base, 0 shots, stop_string) a part of its credit, at most 0.25"
    assert any(sentence.startswith(begins) for sentence in said)


def test_c71_the_threshold_of_an_evaluation_is_an_option_and_what_was_graded_by_another_is_graded_again(tmp_path):
    config = Config(eval_correct="gsm8k.format", eval_threshold=0.25)
    options = protocol.options_of(config, tmp_path)
    assert (options.threshold, protocol.options_of(Config(), tmp_path).threshold) == (0.25, None)
    write_yaml(replace(options, out=None), tmp_path / "options.yaml")
    (tmp_path / "eval.json").write_text("{}")
    assert protocol.is_evaluated(options)
    assert not protocol.is_evaluated(replace(options, threshold=0.5))
    with pytest.raises(ValueError, match="threshold is inf: must be None or finite"):
        replace(options, threshold=float("inf"))


def test_c70_on_answers_that_are_no_numbers_nothing_is_said_of_numbers(scored):
    """The kind: table, sentence and page read different graders (tests/evaluation/test_headline.py).

    A golden answer of JSON is no number: there is no lenient accuracy, and no pair of `last_number`.
    """
    good, bad, other = '{"x": 1}', "no", '{"x": 2}'
    scored({"gsm8k.correctness": {good: 1.0, bad: 0.0, other: 0.0}, "gsm8k.format": {good: 0.5, bad: 0.5, other: 0.5}})
    graded = []
    for model, texts in (("base", [good, bad, other] * 8), ("tuned", [good] * 24)):
        rows = rows_of(texts, answer=good, model=model, early=True)
        graded += grade(rows, ("gsm8k.correctness",), "gsm8k.format")
    result = grading.summarize(graded)
    assert [(cell["lenient_accuracy"], cell["lenient_ci95"]) for cell in result["cells"]] == [(None, None)] * 2
    assert [pair["grader"] for pair in result["paired"]] == ["gsm8k.correctness"] and result["format"] == []
    said = headline.table(result)
    assert "The tuned model is better (grader gsm8k.correctness, stop stop_string, 0 shots, n = 24): +66.7" in said
    assert "last_number" not in said and " -   1.000" in said
    assert [cell["grader"] for cell in headline.readings(result)] == ["gsm8k.correctness"] * 2


@pytest.mark.parametrize("lenient", [None, "gsm8k.last_number"])
def test_format_and_lenient_grader_are_those_of_the_task(scored, lenient):
    """The kind: the headline is by `last_number` on every task, so it says nothing under a gain of 100 points.

    The answers to these problems are numbers, but programs are graded.
    """
    right, wrong = "print(5)\n7", "print(4)\n7"
    scored({"gsm8k.correctness": {right: 1.0, wrong: 0.0}, "gsm8k.last_number": {right: 1.0, wrong: 1.0}})
    graded = []
    for model, text in (("base", wrong), ("tuned", right)):
        rows = rows_of([text] * 20, answer="7", model=model, early=True)
        graded += grade(rows, ("gsm8k.correctness",), None, lenient=lenient)
    result = json.loads(json.dumps(grading.summarize(graded)))
    read = [(None, None)] * 2 if lenient is None else [(1.0, wilson(20, 20))] * 2
    assert [(cell["lenient_accuracy"], cell["lenient_ci95"]) for cell in result["cells"]] == read
    assert (result["lenient"], [cell["format_rate"] for cell in result["cells"]]) == (lenient, [None, None])
    graders = ["gsm8k.correctness", *([lenient] if lenient else [])]
    assert [pair["grader"] for pair in result["paired"]] == graders
    assert list(dict.fromkeys(cell["grader"] for cell in headline.readings(result))) == graders
    said = headline.table(result)
    assert "The tuned model is better (grader gsm8k.correctness, stop stop_string, 0 shots, n = 20): +100.0" in said
    assert f"{'-' if lenient is None else '1.000':>7}       -     1.000" in said


def test_an_evaluation_follows_the_task_of_its_data():
    of = {data: EvalOptions(model="m", data=data) for data in ("arithmetic", "code")}
    assert of["arithmetic"].graders == Task.graders
    assert [(o.lenient, o.format, o.timeout) for o in of.values()] == [
        *(("last_number", "gsm8k.format", 5.0), (None, None, 20.0)),
    ]
    assert of["code"].graders == ("code.correctness",)
    assert EvalOptions(model="m", data="code", lenient="last_number").lenient == "last_number"


def test_base_alone_has_cells_and_nothing_else():
    result = grading.summarize(grade(rows_of([RIGHT, " 20"])))
    assert len(result["cells"]) == len(Task.graders) * 2
    assert (result["paired"], result["split"], result["format"]) == ([], [], [])


def test_several_shots_are_kept_apart_and_in_order():
    graded = []
    for model, shots, texts in (
        *(("tuned", 16, [RIGHT, " 20"]), ("tuned", 2, [RIGHT, RIGHT])),
        *(("base", 16, [" 20", " 20"]), ("base", 2, [RIGHT, " 20"])),
    ):
        graded += grade(rows_of(texts, model=model, shots=shots, early=True), ("last_number", "marker"))
    result = grading.summarize(graded)
    assert [(c["model"], c["shots"], c["correct"]) for c in result["cells"][::2]] == [
        *(("base", 2, 1), ("base", 16, 0), ("tuned", 2, 2), ("tuned", 16, 1)),
    ]
    assert [(pair["shots"], pair["difference"]) for pair in result["paired"][::2]] == [(2, 0.5), (16, 0.5)]
    assert [(split["shots"], split["total"]) for split in result["format"]] == [(2, 0.5), (16, 0.5)]


def test_several_samples_are_a_cluster():
    right = {0: 4, 1: 1, 2: 0}
    texts = [" 18" if j < right[i] else [" 20", " 20", " 7", ""][j] for i in range(3) for j in range(4)]
    cell = by_key(cells_of(rows_of(texts, samples=4)))["base", 0, "eos", "last_number"]
    assert cell.keys() == CELL | {"samples", "pass_at", "majority"}
    assert (cell["n"], cell["samples"], cell["correct"], cell["accuracy"]) == (3, 4, 5, pytest.approx(5 / 12))
    assert cell["ci95"] == mean_interval([1.0, 0.25, 0.0], 0, 1) == cell["lenient_ci95"]
    assert list(cell["pass_at"]) == ["1", "2", "4"]
    assert cell["pass_at"]["1"] == {"value": pytest.approx(5 / 12), "ci95": cell["ci95"]}
    assert cell["pass_at"]["2"]["value"] == pytest.approx((1 + 1 / 2 + 0) / 3)  # 3 of 6 pairs hold the right one
    assert cell["pass_at"]["4"] == {"value": pytest.approx(2 / 3), "ci95": mean_interval([1.0, 1.0, 0.0], 0, 1)}
    # 18 always; one vote each for 18, 20 and 7 (the empty text has none); 20 twice.
    expected = mean_interval([1.0, 1 / 3, 0.0], 0, 1)
    assert cell["majority"] == {"value": pytest.approx((1 + 1 / 3 + 0) / 3), "ci95": expected}


@pytest.mark.parametrize(("samples", "sizes"), [(2, "1 2"), (3, "1 2 3"), (6, "1 2 4 6"), (8, "1 2 4 8")])
def test_pass_at_has_the_number_of_samples_itself(samples, sizes):
    (cell,) = cells_of(rows_of([" 18"] * samples, samples, early=True), ("last_number",))
    assert " ".join(cell["pass_at"]) == sizes


def test_several_samples_are_paired_by_problem_and_have_no_mcnemar():
    base = [" 18", " 20", " 20", " 20", " 18", " 18"]
    tuned = [" 18", " 18", " 20", " 18", " 18", " 20"]
    result = summary(base, tuned, samples=2, graders=("last_number", "published"))
    pair = next(pair for pair in result["paired"] if (pair["grader"], pair["stop"]) == ("last_number", "eos"))
    assert pair.keys() == PAIR
    assert (pair["n"], pair["difference"], pair["p_value"]) == (3, pytest.approx(0.5 / 3), None)
    assert pair["ci95"] == mean_interval([0.5, 0.5, -0.5], -1, 1)
    assert result["split"][0]["left"] == pair["difference"]


@pytest.mark.parametrize("samples", [1, 2])
def test_what_is_graded_from_files_is_what_was_graded(tmp_path, few_resamples, samples):
    texts = {
        ("base", 16): [" 18" + NEXT, " 20", RIGHT, ""],
        ("base", 2): [" 20", RIGHT + NEXT, " é 18", " \u4e09 7\u2028"],
        ("tuned", 16): [RIGHT, RIGHT, "\r\n#### 18\x0b", RIGHT],
        ("tuned", 2): [RIGHT, " 20", RIGHT, " 18"],
    }
    graded = []
    for (model, shots), written in texts.items():
        rows = rows_of(written, samples, model=model, shots=shots)
        write_lines(tmp_path / f"{model}_{shots}shots.jsonl", rows)
        graded += grade(rows)
    again = EvalOptions(regrade=str(tmp_path), format="marker")
    first = compare.regrade(again)
    assert first == grading.summarize(graded) == json.loads((tmp_path / "eval.json").read_text())
    assert by_key(first["cells"])["tuned", 16, "eos", "last_number"]["correct"] == 4
    before = (tmp_path / "eval.json").read_bytes()
    few = compare.regrade(replace(again, graders=("published",), out=str(tmp_path / "few")))
    assert few["cells"] == [cell for cell in first["cells"] if cell["grader"] == "published"]
    assert (tmp_path / "eval.json").read_bytes() == before


def test_graders_do_not_see_what_stands_before_the_end_of_the_reasoning():
    texts = ["<think>so 18</think> I do not know.", "<think>17?</think>\n#### 18", "never ends: 18"]
    seen, all_ = (
        by_key(cells_of(rows_of(texts, early=True), ("last_number", "marker"), "marker", reasoning_end=end))
        for end in ("</think>", None)
    )
    right = {
        name: cells["base", 0, "stop_string", "last_number"]["correct"] for name, cells in (("s", seen), ("a", all_))
    }
    assert right == {"s": 2, "a": 3}
    assert seen["base", 0, "stop_string", "marker"]["correct"] == 1


def test_reasoning_is_known_to_reward_functions_too_and_may_be_given_when_texts_are_graded_again(tmp_path):
    rows = rows_of(["<think>18</think> no"], early=True)
    options = EvalOptions(model="m", graders=("gsm8k.last_number",), format="marker", reasoning_end="</think>")
    assert grading.grade(rows, options)[0].cell["correct"] == 0
    assert EvalOptions(regrade=str(tmp_path), reasoning_end="</think>").reasoning_end == "</think>"
