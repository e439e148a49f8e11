"""From transcripts to `eval.json`: stop policies, cells, pairs, the splits, several samples, and what is claimed."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config import Config
from grpo.evaluation import compare, grading, headline, protocol, statistics
from grpo.evaluation.compare import EvalOptions
from grpo.evaluation.graders import GRADERS
from grpo.evaluation.statistics import mcnemar, mean_interval, wilson
from grpo.options import write_yaml
from rewards import gsm8k

PROMPT = "Question: 6 * 3?\nSolution: Let's think step by step."
NEXT = "\n\nQuestion: 5 and 2?\n#### The final answer is 7"
RIGHT = "\n#### The final answer is 18"
CELL = {"model", "shots", "stop", "grader", "n", "correct", "accuracy", "ci95"} | {
    *("format_rate", "finished", "run_on", "mean_tokens"),
}
PAIR = {"shots", "stop", "grader", "n", "both", "only_base", "only_tuned", "neither"} | {
    *("difference", "ci95", "p_value"),
}


def row(completion, *, ended="eos", answer="18", stop=("\n\nQuestion:",), model="base", shots=0, index=0, sample=0):
    """A transcript of a model whose tokens are characters."""
    ends = [at + len(string) for string in stop if (at := completion.find(string)) >= 0]
    return {
        **{"model": model, "shots": shots, "index": index, "sample": sample, "question": "6 * 3?", "prompt": PROMPT},
        **{"answer": answer, "stop": list(stop), "stop_early": False, "completion": completion, "ended": ended},
        "info": {},
        **{"tokens": len(completion) + (ended == "eos"), "stop_tokens": min(ends, default=None)},
    }


def rows_of(completions, samples=1, **fields):
    return [row(text, index=i // samples, sample=i % samples, **fields) for i, text in enumerate(completions)]


def grade(rows, graders=tuple(GRADERS), stops=grading.STOPS, format_reward="marker"):
    """Graded without a process for rewards, the format being a grader."""
    return grading.grade(rows, graders, stops, format_reward, 5.0)


def by_key(cells):
    return {(cell["model"], cell["shots"], cell["stop"], cell["grader"]): cell for cell in cells}


TEXTS = st.sampled_from([RIGHT, RIGHT + NEXT, " 18", " 18" + NEXT, "\n#### 20", " 20" + NEXT, " 7", "", " 3", NEXT])


@pytest.mark.parametrize(
    ("completion", "stop", "expected"),
    [
        ("a 18", ("\n\nQuestion:",), "a 18"),
        ("a 18\n\nQuestion: b", ("\n\nQuestion:",), "a 18"),
        ("a\n\nQuestion: b\n\nQuestion: c", ("\n\nQuestion:",), "a"),
        ("a\nQuestion:", ("\n\nQuestion:",), "a\nQuestion:"),
        ("a\n\n\nQuestion:", ("\n\nQuestion:",), "a\n"),
        ("\n\nQuestion:", ("\n\nQuestion:",), ""),
        ("a STOP b END", ("END", "STOP"), "a "),
        ("a END b STOP", ("END", "STOP"), "a "),
        ("a ab", ("b", "ab"), "a "),
        ("a", (), "a"),
    ],
)
def test_a_text_is_cut_exactly_at_its_first_stop_string(completion, stop, expected):
    assert grading.cut(row(completion, stop=stop)) == expected


def test_each_stop_policy_grades_its_own_text_and_counts_its_own_tokens():
    rows = rows_of([RIGHT + NEXT, RIGHT + NEXT, " 20", "\n#### 18"], ended="limit")
    rows[1]["ended"] = rows[3]["ended"] = "eos"
    rows[1]["tokens"] += 1
    cells = by_key(grading.summarize(grade(rows))["cells"])
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


def test_a_text_that_ended_early_is_graded_as_it_is():
    rows = [row(RIGHT, ended="stop") | {"stop_early": True, "stop_tokens": 40, "tokens": 40}]
    (cell,) = grading.summarize(grade(rows, ("marker",), ("stop_string",)))["cells"]
    assert (cell["correct"], cell["finished"], cell["run_on"], cell["mean_tokens"]) == (1, 1.0, 1.0, 40.0)


def test_c42_a_cell_has_the_fields_of_eval_json():
    rows = rows_of([RIGHT, " 18", " 20", RIGHT + NEXT], shots=2)
    graded = grading.grade(rows, ("marker", "last_number"), grading.STOPS, "gsm8k.format", 5.0)
    cells = [grading.cell(grades) for grades in graded]
    assert [(cell["stop"], cell["grader"]) for cell in cells] == [
        *(("stop_string", "marker"), ("stop_string", "last_number"), ("eos", "marker"), ("eos", "last_number")),
    ]
    strict, lenient = cells[:2]
    assert strict.keys() == CELL | {"lenient_accuracy", "lenient_ci95"}
    assert (strict["model"], strict["shots"], strict["n"], strict["correct"], strict["accuracy"]) == (
        *("base", 2, 4, 2, 0.5),
    )
    assert strict["ci95"] == wilson(2, 4)
    assert strict["format_rate"] == 0.5
    assert (strict["lenient_accuracy"], strict["lenient_ci95"]) == (lenient["accuracy"], lenient["ci95"])
    assert (lenient["correct"], lenient["ci95"]) == (3, wilson(3, 4))
    assert cells[2]["format_rate"] == 0.25  # the run-on brings a second answer line
    json.dumps(cells)


def test_a_reward_function_grades_as_its_grader_does():
    rows = rows_of([RIGHT, " 18", RIGHT + NEXT], answer="18")
    reward, marker = grading.grade(rows, ("gsm8k.correctness", "marker"), ("stop_string",), "gsm8k.format", 5.0)
    assert reward.correct.tolist() == marker.correct.tolist() == [True, False, True]
    assert reward.formatted.tolist() == [True, False, True]
    assert reward.values == [None] * 3


@pytest.mark.parametrize("where", ["grader", "format"])
def test_an_unknown_grader_is_refused_with_the_known_ones(where):
    names = ("marker", "nearly") if where == "grader" else ("marker",)
    with pytest.raises(ValueError, match="'nearly' is not one of " + ", ".join(GRADERS)):
        grade(rows_of([RIGHT]), names, format_reward="nearly" if where == "format" else "marker")


def test_an_unknown_reward_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=re.escape("'gsm8k.nearly' is not one of ") + ".*gsm8k.correctness"):
        grading.check_graders(("gsm8k.nearly",))
    grading.check_graders((*GRADERS, "gsm8k.correctness"))


def summary(base, tuned, samples=1, shots=0, **options):
    rows = [rows_of(texts, samples, model=model, shots=shots) for model, texts in (("base", base), ("tuned", tuned))]
    return grading.summarize([grades for each in rows for grades in grade(each, **options)])


def test_a_pair_counts_problems_by_who_has_them_right():
    base = [" 18", " 18", " 20", " 20", " 20", " 20", " 20"]
    tuned = [" 18", " 20", " 18", " 18", " 18", " 18", " 20"]
    result = summary(base, tuned, graders=("last_number",), stops=("eos",))
    (pair,) = result["paired"]
    assert pair.keys() == PAIR
    assert (pair["shots"], pair["stop"], pair["grader"], pair["n"]) == (0, "eos", "last_number", 7)
    assert (pair["both"], pair["only_base"], pair["only_tuned"], pair["neither"]) == (1, 1, 4, 1)
    assert pair["difference"] == pytest.approx(3 / 7)
    assert pair["p_value"] == pytest.approx(12 / 32)  # 2 * (1 + 5) / 2**5
    assert pair["ci95"] == mean_interval([0, -1, 1, 1, 1, 1, 0], -1, 1)


@pytest.fixture(scope="module")
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 50)
        yield


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12))
def test_pairs_and_splits_add_up(few_resamples, pairs):
    base, tuned = zip(*pairs, strict=True)
    result = summary(base, tuned)
    cells, n = by_key(result["cells"]), len(pairs)
    assert len(result["paired"]) == len(GRADERS) * 2
    for pair in result["paired"]:
        of = {model: cells[model, 0, pair["stop"], pair["grader"]] for model in ("base", "tuned")}
        assert pair["both"] + pair["only_base"] + pair["only_tuned"] + pair["neither"] == pair["n"] == n
        assert pair["both"] + pair["only_base"] == of["base"]["correct"]
        assert pair["both"] + pair["only_tuned"] == of["tuned"]["correct"]
        assert pair["difference"] == pytest.approx(of["tuned"]["accuracy"] - of["base"]["accuracy"], abs=1e-12)
        assert pair["p_value"] == mcnemar(pair["only_base"], pair["only_tuned"])

    def D(grader, stop):
        return cells["tuned", 0, stop, grader]["correct"] - cells["base", 0, stop, grader]["correct"]

    (split,), (form,) = result["split"], result["format"]
    assert split.keys() == {"shots", "total", "stopping", "grader", "left", "ci95"}
    counts = {name: round(n * split[name]) for name in ("total", "stopping", "grader", "left")}
    assert all(split[name] == pytest.approx(counts[name] / n, abs=1e-12) for name in counts)
    assert counts == {
        "total": D("published", "eos"),
        "stopping": D("published", "eos") - D("published", "stop_string"),
        "grader": D("published", "stop_string") - D("last_number", "stop_string"),
        "left": D("last_number", "stop_string"),
    }
    assert counts["total"] == counts["stopping"] + counts["grader"] + counts["left"]
    assert form.keys() == {"shots", "total", "format", "left", "ci95"}
    assert form["total"] == pytest.approx(D("marker", "stop_string") / n, abs=1e-12)
    assert form["left"] == split["left"]
    assert form["total"] == pytest.approx(form["format"] + form["left"], abs=1e-12)
    for parts in (split, form):
        for name, (low, high) in parts["ci95"].items():
            assert low - 1e-12 <= parts[name] <= high + 1e-12


def test_a_model_that_only_learned_to_stop_gains_by_stopping_alone():
    base = [" 18" + NEXT] * 6 + [" 20"] * 4
    tuned = [" 18"] * 6 + [" 20"] * 4
    (split,) = summary(base, tuned)["split"]
    assert (split["total"], split["stopping"], split["grader"], split["left"]) == (0.6, 0.6, 0.0, 0.0)
    unseen = 1 - 0.05 ** (1 / 10)  # no problem differs, by answers or by grader: up to this share may
    assert split["ci95"]["left"] == pytest.approx([-unseen, unseen])
    assert split["ci95"]["grader"] == pytest.approx([-2 * unseen, 2 * unseen])
    assert split["ci95"]["stopping"][0] > 0


def test_a_model_that_only_learned_the_format_gains_by_format_alone():
    (form,) = summary([" 18"] * 5 + [" 20"] * 5, [RIGHT] * 5 + [" 20"] * 5)["format"]
    assert (form["total"], form["format"], form["left"]) == (0.5, 0.5, 0.0)


def test_a_model_that_got_better_keeps_its_gain_in_both_splits():
    result = summary([" 20"] * 8 + [RIGHT] * 2, [RIGHT] * 10)
    (split,), (form,) = result["split"], result["format"]
    assert (split["total"], split["stopping"], split["grader"], split["left"]) == (0.8, 0.0, 0.0, 0.8)
    assert (form["total"], form["format"], form["left"]) == (0.8, 0.0, 0.8)


def test_what_only_the_published_grader_misreads_is_the_graders():
    (split,) = summary([" 18.0", " 18.0"], [" 18", " 20"])["split"]
    assert (split["total"], split["stopping"], split["grader"], split["left"]) == (0.5, 0.0, 1.0, -0.5)


@pytest.mark.parametrize(
    ("graders", "stops", "splits"),
    [
        (("published", "last_number"), grading.STOPS, (1, 0)),
        (("published", "last_number"), ("stop_string",), (0, 0)),
        (("marker", "last_number"), ("stop_string",), (0, 1)),
        (("marker",), grading.STOPS, (0, 1)),  # every cell is read by its last number too
        (("published",), grading.STOPS, (1, 0)),
        (("lm_eval_strict",), grading.STOPS, (0, 0)),
    ],
)
def test_a_split_is_there_where_its_gradings_are(graders, stops, splits):
    result = summary([RIGHT], [RIGHT], graders=graders, stops=stops)
    assert (len(result["split"]), len(result["format"])) == splits
    assert len(result["paired"]) == len({*graders, "last_number"}) * len(stops)


def test_the_training_reward_of_a_run_is_told_from_format():
    rows = [rows_of(texts, model=model) for model, texts in (("base", [" 18", " 20"]), ("tuned", [RIGHT, " 20"]))]
    graded = [grading.grade(each, ("gsm8k.correctness",), ("stop_string",), "marker", 5.0)[0] for each in rows]
    result = grading.summarize(graded)
    assert [(pair["grader"], pair["difference"]) for pair in result["paired"]] == [
        ("gsm8k.correctness", 0.5), ("last_number", 0.0)
    ]  # fmt: skip
    (form,) = result["format"]
    assert (form["total"], form["format"], form["left"]) == (0.5, 0.5, 0.0)
    assert [cell["grader"] for cell in result["cells"]] == ["gsm8k.correctness"] * 2


def test_a_reward_that_fails_is_counted_with_its_first_reason(monkeypatch):
    def score(runner, texts, problems):
        runner.first_errors = {"gsm8k.format": "no number"}
        return [[None if "20" in text else 1.0 for text in texts], [1.0] * len(texts)]

    monkeypatch.setattr(grading.RewardRunner, "score", score)
    rows = rows_of([RIGHT, " 20", " 20"])
    graded = grading.grade(rows, ("gsm8k.correctness", "marker"), ("eos",), "gsm8k.format", 5.0)
    cells = [grading.cell(grades) for grades in graded]
    assert [one["failures"] for one in cells] == [{"gsm8k.format": {"texts": 2, "first": "no number"}}] * 2
    assert cells[0]["format_rate"] == pytest.approx(1 / 3) and cells[0]["correct"] == 3


@pytest.mark.parametrize(
    ("full", "threshold", "right", "formatted", "partial"),
    [
        (None, None, 1, 3, {"texts": 3, "highest": 0.5, "needed": 1.0}),
        (None, 0.5, 2, 3, {"texts": 2, "highest": 0.05, "needed": 0.5}),
        (2.0, None, 0, 3, {"texts": 4, "highest": 1.0 - 1e-9, "needed": 2.0}),
        (0.05, None, 4, 3, None),
    ],
)
def test_c71_partial_credit_is_not_right(monkeypatch, full, threshold, right, formatted, partial):
    """The kind: any value above 0 counts as success, so a credit of 0.05 makes an accuracy of 0.9.

    Siblings: accuracy, pass@k, pairs, the format rate, the doctor's probes (tests/doctor/test_check_graders.py).
    """
    values = {RIGHT: 1.0 - 1e-9, " 20": 0.05, " 7": 0.5, "": 0.05, " 3": 0.0}
    monkeypatch.setattr(
        grading.RewardRunner,
        "score",
        lambda runner, texts, problems: [
            [0.5, 0.5, 0.5, 0.25, 0.0],
            [values[text] for text in texts],
        ],
    )
    if full is not None:
        monkeypatch.setattr(gsm8k.correctness, "full_value", full, raising=False)
    (grades,) = grading.grade(
        rows_of(values), ("gsm8k.correctness",), ("eos",), "gsm8k.format", 5.0, threshold=threshold
    )
    cell = grading.cell(grades)
    assert (cell["correct"], cell["accuracy"], cell["format_rate"]) == (right, right / 5, formatted / 5)
    parts = {"gsm8k.format": {"texts": 1, "highest": 0.25, "needed": 0.5}}
    assert cell["partial"] == parts | ({"gsm8k.correctness": partial} if partial else {})
    said = headline.failures({"cells": [cell]})
    assert ("gsm8k.correctness gave" in " ".join(said)) == bool(partial)
    begins = "gsm8k.format gave 1 of 5 texts (base, 0 shots, eos) a part of its credit, at most 0.25"
    assert any(sentence.startswith(begins) for sentence in said)


def test_c71_the_threshold_of_an_evaluation_is_an_option_and_what_was_graded_by_another_is_graded_again(tmp_path):
    config = Config(eval_correct="gsm8k.format", eval_threshold=0.25)
    options = protocol.options_of(config, tmp_path)
    assert (options.threshold, protocol.options_of(Config(), tmp_path).threshold) == (0.25, None)
    write_yaml(replace(options, out=None), tmp_path / "options.yaml")
    (tmp_path / "eval.json").write_text("{}")
    assert protocol.is_evaluated(options)
    assert not protocol.is_evaluated(replace(options, threshold=0.5))
    with pytest.raises(ValueError, match="threshold is inf: must be None, or finite"):
        replace(options, threshold=float("inf"))


JSON = {"base": ['{"x": 1}', "no", '{"x": 2}'] * 8, "tuned": ['{"x": 1}'] * 24}


def test_c70_on_answers_that_are_no_numbers_nothing_is_said_of_numbers(monkeypatch):
    """The kind: table, sentence and page read different graders (tests/evaluation/test_headline.py).

    A golden answer of JSON is no number: there is no lenient accuracy, and no pair of `last_number`.
    """
    monkeypatch.setattr(
        grading.RewardRunner,
        "score",
        lambda runner, texts, problems: [[0.5] * len(texts), [float(text == '{"x": 1}') for text in texts]],
    )
    graded = []
    for model, texts in JSON.items():
        rows = rows_of(texts, answer='{"x": 1}', model=model)
        graded += grading.grade(rows, ("gsm8k.correctness",), ("stop_string",), "gsm8k.format", 5.0)
    result = grading.summarize(graded)
    assert [cell["lenient_accuracy"] for cell in result["cells"]] == [None, None]
    assert [cell["lenient_ci95"] for cell in result["cells"]] == [None, None]
    assert [pair["grader"] for pair in result["paired"]] == ["gsm8k.correctness"] and result["format"] == []
    said = headline.table(result)
    assert "The tuned model is better (grader gsm8k.correctness, stop stop_string, 0 shots, n = 24): +66.7" in said
    assert "last_number" not in said and " -   1.000" in said
    assert [cell["grader"] for cell in headline.readings(result)] == ["gsm8k.correctness"] * 2


def test_base_alone_has_cells_and_nothing_else():
    result = grading.summarize(grade(rows_of([RIGHT, " 20"])))
    assert len(result["cells"]) == len(GRADERS) * 2
    assert (result["paired"], result["split"], result["format"]) == ([], [], [])


def test_several_shots_are_kept_apart_and_in_order():
    rows = [
        *(rows_of([RIGHT, " 20"], model="tuned", shots=16), rows_of([RIGHT, RIGHT], model="tuned", shots=2)),
        *(rows_of([" 20", " 20"], shots=16), rows_of([RIGHT, " 20"], shots=2)),
    ]
    result = grading.summarize(
        [grades for each in rows for grades in grade(each, ("last_number", "marker"), ("stop_string",))]
    )
    assert [(c["model"], c["shots"], c["correct"]) for c in result["cells"][::2]] == [
        *(("base", 2, 1), ("base", 16, 0), ("tuned", 2, 2), ("tuned", 16, 1)),
    ]
    assert [(pair["shots"], pair["difference"]) for pair in result["paired"][::2]] == [(2, 0.5), (16, 0.5)]
    assert [(split["shots"], split["total"]) for split in result["format"]] == [(2, 0.5), (16, 0.5)]


def test_several_samples_are_a_cluster():
    right = {0: 4, 1: 1, 2: 0}
    texts = [" 18" if j < right[i] else [" 20", " 20", " 7", ""][j] for i in range(3) for j in range(4)]
    cell = by_key(grading.summarize(grade(rows_of(texts, samples=4)))["cells"])["base", 0, "eos", "last_number"]
    assert cell.keys() == CELL | {"lenient_accuracy", "lenient_ci95", "samples", "pass_at", "majority"}
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
    (grades,) = grade(rows_of([" 18"] * samples, samples), ("last_number",), ("eos",))
    assert " ".join(grading.cell(grades)["pass_at"]) == sizes


def test_a_reward_has_no_majority_since_it_reads_no_value():
    rows = rows_of([RIGHT, RIGHT, " 20", " 20"], samples=2)
    (grades,) = grading.grade(rows, ("gsm8k.correctness",), ("eos",), "marker", 5.0)
    cell = grading.cell(grades)
    assert (cell["pass_at"]["2"]["value"], cell["majority"]) == (0.5, None)


def test_several_samples_are_paired_by_problem_and_have_no_mcnemar():
    base = [" 18", " 20", " 20", " 20", " 18", " 18"]
    tuned = [" 18", " 18", " 20", " 18", " 18", " 20"]
    result = summary(base, tuned, samples=2, graders=("last_number", "published"))
    pair = next(pair for pair in result["paired"] if (pair["grader"], pair["stop"]) == ("last_number", "eos"))
    assert pair.keys() == PAIR - {"both", "only_base", "only_tuned", "neither"}
    assert (pair["n"], pair["difference"], pair["p_value"]) == (3, pytest.approx(0.5 / 3), None)
    assert pair["ci95"] == mean_interval([0.5, 0.5, -0.5], -1, 1)
    assert result["split"][0]["left"] == pair["difference"]


def test_different_problems_are_not_paired():
    with pytest.raises(AssertionError, match="not the same problems"):
        summary([" 18", " 18"], [" 18"])


@pytest.mark.parametrize("samples", [1, 2])
def test_grading_again_gives_the_same_eval_json(tmp_path, monkeypatch, samples):
    texts = {
        ("base", 16): [" 18" + NEXT, " 20", RIGHT, ""],
        ("base", 2): [" 20", RIGHT + NEXT, " é 18", " \u4e09 7"],
        ("tuned", 16): [RIGHT, RIGHT, "\r\n#### 18\x0b", RIGHT],
        ("tuned", 2): [RIGHT, " 20", RIGHT, " 18"],
    }
    answers = iter(texts.values())  # both numbers of shots of base, then those of tuned
    monkeypatch.setattr(compare, "load_policy", lambda *_, **__: (None, None))
    monkeypatch.setattr(compare, "Sampler", lambda *_, **__: None)
    monkeypatch.setattr(compare, "load_shapes", lambda *_: (None, None))
    monkeypatch.setattr(compare, "learned_positions", lambda model: None)
    monkeypatch.setattr(compare, "prepare", lambda options, _: dict.fromkeys(options.shots))
    monkeypatch.setattr(
        compare,
        "transcribe",
        lambda *_: [
            {name: value for name, value in one.items() if name not in ("model", "shots")}
            for one in rows_of(next(answers), samples)
        ],
    )
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    options = EvalOptions(
        model="base", tuned="tuned", shots=(16, 2), format="marker", samples=samples, temperature=1.0, out=str(tmp_path)
    )
    first = compare.compare_models(options, torch.device("cpu"), "fp32")
    written = (tmp_path / "eval.json").read_bytes()
    assert json.loads(written) == first
    assert by_key(first["cells"])["tuned", 16, "eos", "last_number"]["correct"] == 4
    again = EvalOptions(regrade=str(tmp_path), format="marker")
    assert compare.regrade(again) == first
    assert (tmp_path / "eval.json").read_bytes() == written
    few = compare.regrade(replace(again, graders=("published",), out=str(tmp_path / "few")))
    assert few["cells"] == [cell for cell in first["cells"] if cell["grader"] == "published"]
    assert (tmp_path / "eval.json").read_bytes() == written


def test_grading_again_says_nothing_of_run_on_text_that_was_not_written(tmp_path):
    rows = [one | {"stop_early": True} for one in rows_of([RIGHT, " 20"], ended="stop")]
    (tmp_path / "base_0shots.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    result = compare.regrade(EvalOptions(regrade=str(tmp_path), format="marker"))
    assert {cell["stop"] for cell in result["cells"]} == {"stop_string"}
