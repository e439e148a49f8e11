"""Answers to whole splits, greedily, whatever the batch; what a run evaluates, and that it checks that beforehand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
from data.problem import Problem
from grpo.config import Config
from grpo.dataloader import ProblemSets
from grpo.evaluation import grading
from grpo.evaluation.compare import check_planned, compare_models, regrade
from grpo.evaluation.protocol import EvalOptions, is_evaluated, options_of, validation_options
from grpo.evaluation.transcribe import Interrupted, transcribe
from grpo.options import write_yaml
from grpo.policy import Policy
from grpo.sampler import Sampler
from tests.fakes import runs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`model`, `other` (a model) and `data` are there."""
    place = tmp_path_factory.mktemp("evaluate")
    runs.save_digits(place / "model")
    runs.save_digits(place / "other", seed=1)
    runs.write_problems(place / "data", num_test=9)
    return place


def sampler(seed: int = 0) -> Sampler:
    return Sampler(Policy(runs.digit_model(seed), runs.digit_tokenizer()), runs.digit_tokenizer())


def options(place: Path, **changes) -> EvalOptions:
    fixed = {"model": str(place / "model"), "data": "jsonl", "data_path": str(place / "data"), "budget": 12}
    return EvalOptions(**fixed | {"out": str(place / "eval"), "graders": ("last_number",)} | changes)


def problems_of(wanted: EvalOptions) -> list[Problem]:
    return ProblemSets(wanted).problems(wanted.split, 0, wanted.limit)


def greedy(problem, budget: int) -> list[int]:
    """Token by token from transformers' own model, to EOS or the budget."""
    model, tokenizer = runs.digit_model(), runs.digit_tokenizer()
    ids = tokenizer(problem.prompt).input_ids
    start = len(ids)
    while len(ids) < start + budget and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)].argmax()))
    return ids[start:]


def test_c42_every_problem_of_the_split_is_answered_greedily(place):
    wanted = options(place)
    problems = problems_of(wanted)
    assert problems == data.load("jsonl", "test", path=wanted.data_path) and len(problems) == 9
    rows = transcribe(sampler(), problems, wanted)
    tokenizer = runs.digit_tokenizer()
    assert [row["index"] for row in rows] == list(range(9)) and {row["sample"] for row in rows} == {0}
    for row, problem in zip(rows, problems, strict=True):
        ids = greedy(problem, 12)
        eos = ids[-1] == tokenizer.eos_token_id
        assert row["completion"] == tokenizer.decode(ids[: len(ids) - eos])
        assert (row["tokens"], row["ended"]) == (len(ids), "eos" if eos else "limit")
        assert (row["prompt"], row["answer"]) == (problem.prompt, problem.answer)


def test_stop_early_gives_the_same_text_up_to_the_stop_string(place):
    problems = problems_of(options(place))
    seen = transcribe(sampler(), problems, options(place))[0]["completion"][4:6]
    problems = [replace(problem, info={**problem.info, "stop": ["##", seen]}) for problem in problems]
    whole = transcribe(sampler(), problems, options(place))
    early = transcribe(sampler(), problems, options(place, stop_early=True))
    assert {row["ended"] for row in early} & {"stop"}
    for one, other in zip(whole, early, strict=True):
        assert other["stop_tokens"] == one["stop_tokens"]
        assert other["completion"] == one["completion"].split(seen)[0].split("##")[0]
        if other["ended"] == "stop":
            assert other["tokens"] == one["stop_tokens"] <= one["tokens"]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_batch_changes_no_answer(place, batch):
    problems = problems_of(options(place))
    at_once = transcribe(sampler(), problems, options(place))
    assert transcribe(sampler(), problems, options(place, batch=batch)) == at_once


def test_answers_are_in_the_file_as_they_come_and_are_not_asked_again(place, tmp_path, monkeypatch):
    """Whole problems that still are the same count; a line that was cut in the middle of writing does not."""
    several = options(place, samples=2, temperature=1.0, batch=4)
    problems, file = problems_of(several), tmp_path / "rows"
    rows = transcribe(sampler(), problems, several)
    draws, generate = [], Sampler.generate

    def drawn(*arguments, **asked):
        draws.extend(asked["prompt_index"])
        return generate(*arguments, **asked)

    monkeypatch.setattr(Sampler, "generate", drawn)

    def interrupted(after: int) -> list[dict]:
        stops = iter([False] * after + [True])
        with pytest.raises(Interrupted):
            transcribe(sampler(), problems, several, should_stop=lambda: next(stops), file=file)
        return [json.loads(line) for line in file.read_text().splitlines()]

    first = interrupted(2)
    assert len(first) == 8 and all(row in rows for row in first)
    file.write_bytes(file.read_bytes()[:-5])
    problems[first[0]["index"]] = replace(problems[first[0]["index"]], answer="7")
    assert len(interrupted(1)) == 8  # two problems are left of the four, and two are new
    again = transcribe(sampler(), problems, several, file=file)
    assert len(draws) == 4 + 2 + 5 and [row["completion"] for row in again] == [row["completion"] for row in rows]
    assert [row["answer"] for row in again] == [problem.answer for problem in problems for _ in range(2)]
    assert [json.loads(line) for line in file.read_text().splitlines()] == again


def test_several_samples_differ_and_repeat(place):
    several = options(place, samples=3, temperature=1.0, budget=8)
    problems = problems_of(several)
    rows = transcribe(sampler(), problems, several)
    assert [(row["index"], row["sample"]) for row in rows] == [(i, j) for i in range(9) for j in range(3)]
    assert len({row["completion"] for row in rows[:3]}) > 1
    assert transcribe(sampler(), problems, replace(several, batch=3)) == rows
    assert transcribe(sampler(), problems, replace(several, seed=1)) != rows
    ids = [runs.digit_tokenizer()(problem.prompt).input_ids for problem in problems]
    trained = sampler().generate(ids, group_size=3, max_new_tokens=8, temperature=1.0, seed=0, step=0)
    assert trained.texts != [row["completion"] for row in rows]  # evaluation has draws of its own


def test_limit_takes_the_first_problems(place):
    assert problems_of(options(place, limit=4)) == problems_of(options(place))[:4]


def test_nothing_to_evaluate_is_an_error(place):
    with pytest.raises(ValueError, match="no problem to evaluate"):
        transcribe(sampler(), [], options(place))


def test_compare_writes_cells_of_base_and_tuned_and_every_transcript(place):
    out = place / "compared"
    wanted = options(place, tuned=str(place / "other"), out=str(out))
    result = compare_models(wanted, torch.device("cpu"), "fp32")
    assert json.loads((out / "eval.json").read_text()) == json.loads(json.dumps(result))
    assert [(cell["model"], cell["stop"], cell["n"]) for cell in result["cells"]] == [
        (model, stop, 9) for model in ("base", "tuned") for stop in ("stop_string", "eos")
    ]
    for name, seed in (("base", 0), ("tuned", 1)):
        rows = [json.loads(line) for line in (out / f"{name}_0shots.jsonl").read_text().splitlines()]
        assert rows == transcribe(sampler(seed), problems_of(wanted), wanted, model=name)


def test_tests_of_problems_are_in_no_transcript_and_a_regrading_reads_them_again(place, tmp_path, monkeypatch):
    lines = [{"prompt": f"{i}+1=", "tests": [{"input": "", "output": str(i)}], "solution": "2"} for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    graded = []

    def score(runner, completions, problems, told):
        graded.append([(problem.prompt, problem.info["tests"]["cases"][0]["output"]) for problem in problems])
        return [[1.0] * len(problems) for _ in runner.names]

    monkeypatch.setattr(grading.RewardRunner, "score", score)
    here = {"data": "code", "data_path": str(tmp_path / "data.jsonl"), "out": str(tmp_path / "eval"), "limit": 2}
    wanted = options(place, graders=("gsm8k.correctness",), **here)
    compare_models(wanted, torch.device("cpu"), "fp32")
    file = tmp_path / "eval" / "base_0shots.jsonl"
    problems = problems_of(wanted)
    assert [json.loads(line)["info"] for line in file.read_text().splitlines()] == [
        problem.info | {"tests": None} for problem in problems
    ]
    assert transcribe(sampler(), problems, wanted, file=file, model="base")[0]["info"] == problems[0].info
    again = EvalOptions(regrade=str(tmp_path / "eval"), graders=("gsm8k.format",), out=str(tmp_path / "again"))
    assert (again.lenient, regrade(again)["lenient"]) == ("auto", None)  # the data of the transcripts has none
    expected = [(problem.prompt, problem.prompt[:-3]) for problem in problems]
    assert graded == [expected] * 4 and len(expected) == 2
    lines = [line | {"solution": "3"} for line in lines]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"regrade: problem 0 of .*data.jsonl is not the one that was asked"):
        regrade(replace(again, out=str(tmp_path / "third")))
    (tmp_path / "eval" / "options.yaml").unlink()
    with pytest.raises(ValueError, match="regrade: .* has no options.yaml, which says where the tests"):
        regrade(replace(again, out=str(tmp_path / "third")))


def test_the_evaluation_of_a_run_is_of_its_own_prompts_and_graders():
    config = Config(
        model="m", revision="r", data="jsonl", data_path="d", seed=3, num_shots=2, max_new_tokens=33, eval_batch=5,
        max_prompt_tokens=5000, eval_correct="gsm8k.correctness", eval_format="gsm8k.format", final_eval_limit=11,
        eval_limit=7, chat=True, eval_every=1,
    )  # fmt: skip
    final = options_of(config, Path("runs/x/eval"))
    assert (final.model, final.tuned, final.revision) == ("m", "runs/x/final", "r")
    assert (final.data, final.data_path, final.seed, final.shots, final.chat) == ("jsonl", "d", 3, (2,), True)
    assert (final.split, final.limit, final.budget, final.batch) == ("test", 11, 33, 5)
    assert final.max_prompt_tokens == 5000  # what training allowed
    assert (final.graders, final.format, final.stop_early) == (("gsm8k.correctness",), "gsm8k.format", True)
    assert (final.samples, final.temperature) == (1, 0.0)
    assert options_of(replace(config, eval_shots=(0, 4)), Path("x/eval")).shots == (0, 4)
    during = validation_options(replace(config, eval_shots=(0, 4)))
    assert (during.split, during.shots, during.limit) == ("validation", (2,), 7)


def test_an_evaluation_is_done_if_it_was_made_with_the_same_options_at_these_shots(tmp_path):
    made = EvalOptions(model="m", tuned="t", shots=(0, 2), limit=5, out=str(tmp_path))
    assert not is_evaluated(made)
    write_yaml(made, tmp_path / "options.yaml")
    assert not is_evaluated(made)  # eval.json is written last
    (tmp_path / "eval.json").write_text("{}")
    assert is_evaluated(made)
    assert is_evaluated(replace(made, shots=(2,), tuned="elsewhere", data_path="d", batch=3, device="cpu"))
    for other in ({"shots": (0, 4)}, {"limit": 6}, {"graders": ("marker",)}, {"format": "a.b"}, {"budget": 9}):
        assert not is_evaluated(replace(made, **other)), other


def test_what_evaluations_will_need_is_checked_before(place):
    fixed = {"model": str(place / "model"), "data": "jsonl", "data_path": str(place / "data"), "eval_every": 0}

    def planned(**changes) -> None:
        config = Config(**fixed | changes)
        check_planned(config, ProblemSets(config))

    planned(final_eval=False, eval_correct="gsm8k.nonsense")
    planned()
    with pytest.raises(ValueError, match="'gsm8k.nonsense' is not one of"):
        planned(eval_correct="gsm8k.nonsense")
    with pytest.raises(ValueError, match="'gsm8k.nonsense' is not one of"):
        planned(eval_every=1, final_eval=False, eval_format="gsm8k.nonsense")
    with pytest.raises(ValueError, match="num_shots: 1 is not 0"):
        planned(eval_shots=(0, 1))
    long = place / "long"
    long.mkdir()
    (long / "train.jsonl").write_text((place / "data" / "train.jsonl").read_text())
    (long / "test.jsonl").write_text(json.dumps({"prompt": "1" * 5000, "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match="1 of 1 prompts are longer than 4096 tokens, the longest 5000"):
        planned(data_path=str(long))
    (long / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test\.jsonl"):
        planned(data_path=str(long))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"limit": -1}, "limit is -1: must be a whole number >= 0"),
        ({"budget": 0}, "budget is 0: must be a whole number >= 1"),
        ({"batch": 0}, "batch is 0"),
        ({"shots": ()}, "shots is "),
        ({"shots": (0, 0)}, "none twice"),
        ({"shots": (-1,)}, "shots is "),
        ({"samples": 2}, "temperature is 0.0: must be finite, >= 0, and > 0 with several samples"),
        ({"graders": ()}, "graders is "),
        ({"model": None}, "either --model or --regrade$"),
        ({"model": "m", "regrade": "d"}, "either --model or --regrade, not both"),
        ({"model": None, "regrade": "d", "budget": 512}, "data: must be left out with --regrade"),
    ],
)
def test_options_out_of_range_are_refused(place, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        options(place, **changes)
