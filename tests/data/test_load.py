"""`data.load`: a name is a file; an unknown name or split, or an empty split, is an error that says what there is."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import data
import rewards
from data.problem import Problem, Task
from grpo.evaluation.graders import GRADERS


@pytest.mark.parametrize("name", ["", "nothing", "problem", "prompts", "splits", "__init__", "jsonl.load", "../jsonl"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        data.load(name, "train")
    known = str(error.value).partition(f"data: {name!r} is not one of ")[2].split(", ")
    assert {"arithmetic", "gsm8k", "jsonl"} <= set(known)
    assert not {"problem", "prompts", "splits"} & set(known)


def test_a_misspelt_name_gets_the_near_one():
    with pytest.raises(ValueError, match=r"the path of a \.py file; did you mean arithmetic\?"):
        data.load("arithmatic", "train")


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"split: 'valid' is not one of train, validation, test"):
        data.load("jsonl", "valid")


def test_arguments_reach_the_data_set(monkeypatch):
    import data.jsonl

    given = []
    problem = Problem("p", "a", {})
    monkeypatch.setattr(data.jsonl, "load", lambda *args, **kwargs: given.append((args, kwargs)) or [problem])
    assert data.load("jsonl", "test", path="here", num_shots=3, seed=5) == [problem]
    assert data.load("jsonl", "train") == [problem]
    assert given == [
        (("test",), {"path": "here", "num_shots": 3, "seed": 5}),
        (("train",), {"path": None, "num_shots": 0, "seed": 0}),
    ]


@pytest.mark.parametrize("kind", [str, Path, lambda place: None])
def test_c54_a_path_may_be_a_text_or_a_path_and_a_data_set_sees_a_text(monkeypatch, kind):
    given = []
    monkeypatch.setattr("data.jsonl.load", lambda _, path, **__: given.append(path) or [Problem("p", "a", {})])
    data.load("jsonl", "train", path=kind("here/a.jsonl"))
    assert given == [None if kind("x") is None else "here/a.jsonl"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"path": 3}, "data_path: 3 is no path"),
        ({"num_shots": -1}, "num_shots: -1 must be a whole number >= 0"),
        ({"num_shots": "2"}, "num_shots: '2' must be a whole number >= 0"),
    ],
)
def test_c54_arguments_of_another_kind_are_a_sentence(wrong, said):
    with pytest.raises(ValueError, match=said):
        data.load("arithmetic", "train", **wrong)


def test_an_empty_split_is_refused(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "p", "answer": "a"}))
    assert len(data.load("jsonl", "train", path=file)) == 1
    with pytest.raises(ValueError, match=r"data: 'jsonl' \(data_path: .*one\.jsonl\) has no validation problems"):
        data.load("jsonl", "validation", path=file)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda *_, **__: 1 / 0, "data: 'jsonl' failed .*test_load.py, line .*ZeroDivisionError"),
        (lambda *_, **__: iter([]), "must return a list of Problem"),
        (lambda *_, **__: [Problem("1+1=", 2, {})], "must return a list of Problem with text prompt, text answer"),
    ],
)
def test_a_data_set_of_ones_own_that_is_wrong_is_a_sentence(monkeypatch, made, said):
    monkeypatch.setattr("data.jsonl.load", made)
    with pytest.raises(ValueError, match=said):
        data.load("jsonl", "train")


def test_options_reach_only_a_data_set_that_asks_for_them(monkeypatch):
    given = []
    made = [Problem("p", "a", {})]
    monkeypatch.setattr("data.jsonl.load", lambda split, *, path, num_shots, seed, level: given.append(level) or made)
    assert data.load("jsonl", "train", level="hard", other=None) == made and given == ["hard"]
    with pytest.raises(ValueError, match=r"other is 'x': must be left out, since data 'jsonl' does not ask for it"):
        data.load("jsonl", "train", level="hard", other="x")


def test_prompts_of_every_data_set_may_be_framed():
    plain, framed = (data.load("arithmetic", "test", prompt_template=given) for given in (None, "boxed"))
    assert [problem.info["question"] for problem in framed] == [problem.info["question"] for problem in plain]
    assert framed[0].prompt.startswith(plain[0].info["question"] + "\nPlease reason")
    assert data.load("arithmetic", "test", num_shots=1, system_prompt="s")[0].prompt.startswith("s\n\nQuestion:")


def test_a_data_file_states_its_task_and_others_have_that_of_gsm8k(monkeypatch):
    from data.code import TASK

    assert data.task("code") == TASK and TASK.format is None is TASK.lenient
    for name in ("arithmetic", "gsm8k", "jsonl", "no such file", "problem"):
        assert data.task(name) == Task(), name

    def broken(name):
        raise ImportError(name)

    monkeypatch.setattr(data.importlib, "import_module", broken)
    assert data.task("code") == Task()  # `load` says what is wrong


@pytest.mark.parametrize("task", [data.task("arithmetic"), data.task("code")])
def test_what_a_task_names_is_there(task):
    names = {*task.rewards, task.correct, task.format, *task.graders, task.lenient} - {None}
    if any(name.startswith("code.") for name in names) and find_spec("rewards.code") is None:
        pytest.skip("rewards/code.py is not there")
    for name in names:
        assert name in GRADERS or rewards.load(name)
    assert len(task.rewards) == len(task.reward_weights) and task.timeout > 0
