"""GSM8K from local files: the parts of a row, the splits, the exemplars; and the real files where they are at hand."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest

import data
from data import gsm8k, prompts

SPLITS = ("train", "validation", "test")


def row(i: int, padding: int = 0) -> dict:
    words = "x" * padding
    return {"question": f"What is {i} * 2?", "answer": f"{words}{i} * 2 = <<{i}*2={2 * i}>>{2 * i}.\n#### {2 * i:,}"}


@pytest.fixture
def files(tmp_path):
    """200 training rows, the later the longer, and 30 test rows."""
    write(tmp_path / "train.jsonl", *(row(i, padding=3 * i) for i in range(200)))
    write(tmp_path / "test.jsonl", *(row(i) for i in range(1000, 1030)))
    return tmp_path


def write(file, *rows) -> None:
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))


def load(path, split, num_shots=0, seed=0) -> list:
    return data.load("gsm8k", split, path=path, num_shots=num_shots, seed=seed)


def questions(problems) -> list[str]:
    return [problem.info["question"] for problem in problems]


def test_the_parts_of_a_row(files):
    first = load(files, "test")[0]
    assert first.prompt == "Question: What is 1000 * 2?\nSolution: Let's think step by step."
    assert first.answer == "2,000"
    assert first.info == {
        "question": "What is 1000 * 2?",
        "solution": "1000 * 2 = 2000.",
        "shots": [],
        "stop": ["\n\nQuestion:"],
    }


def test_the_test_split_is_the_test_file_whatever_the_seed_and_shots(files):
    expected = [f"What is {i} * 2?" for i in range(1000, 1030)]
    for num_shots, seed in ((0, 0), (4, 0), (4, 1)):
        assert questions(load(files, "test", num_shots, seed)) == expected


def test_validation_is_a_seeded_tenth_of_the_training_file(files):
    train, validation = questions(load(files, "train")), questions(load(files, "validation"))
    assert (len(train), len(validation)) == (180, 20)
    assert sorted(train + validation) == sorted(f"What is {i} * 2?" for i in range(200))
    assert train == sorted(train, key=lambda question: int(question.split()[2]))  # in the order of the file
    assert questions(load(files, "validation", seed=1)) != validation


def test_the_shots_are_the_same_in_every_split_and_removed_from_training_and_validation(files):
    shots = [load(files, split, num_shots=4, seed=7)[0].info["shots"] for split in SPLITS]
    assert shots[0] == shots[1] == shots[2] and len(shots[0]) == 4
    shown = {shot["question"] for shot in shots[0]}
    assert shown <= {f"What is {i} * 2?" for i in range(32)}  # the 8 * 4 shortest
    learned = questions(load(files, "train", 4, 7)) + questions(load(files, "validation", 4, 7))
    assert len(learned) == 196 and not shown & set(learned)
    before = set(questions(load(files, "validation", 0, 7)))
    assert set(questions(load(files, "validation", 4, 7))) == before - shown  # the shots move nothing else
    assert load(files, "train", 4, 8)[0].info["shots"] != shots[0]


def test_the_prompt_of_every_problem_shows_the_shots(files):
    for problem in load(files, "test", num_shots=3):
        assert problem.prompt == prompts.completion_prompt(problem.info["question"], problem.info["shots"])
        assert "<<" not in problem.prompt and problem.prompt.count("#### The final answer is ") == 3


def test_the_shortest_are_measured_as_the_file_has_them(tmp_path):
    marked = {"question": "q", "answer": "<<" + "1+" * 50 + "1=51>>51\n#### 51"}  # short only without its mark
    write(tmp_path / "train.jsonl", marked, *(row(i, padding=30) for i in range(10, 18)))
    write(tmp_path / "test.jsonl", row(1000))
    shown = {shot["question"] for seed in range(60) for shot in load(tmp_path, "test", 1, seed)[0].info["shots"]}
    assert shown == {f"What is {i} * 2?" for i in range(10, 18)}


def test_a_test_question_among_the_shots_is_refused(files):
    shot = load(files, "train", num_shots=1)[0].info["shots"][0]
    write(files / "test.jsonl", row(1000), {"question": shot["question"], "answer": "#### 1"})
    with pytest.raises(ValueError, match=rf"exemplars .*{re.escape(shot['question'])}"):
        load(files, "test", num_shots=1)
    assert len(load(files, "train", num_shots=1)) == 180 - 1
    assert len(load(files, "test")) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"}', "'answer' must be a string, not None"),
        ('{"question": 3, "answer": "#### 1"}', "'question' must be a string, not 3"),
        ('{"question": "q", "answer": "18"}', "'answer' has no '#### ' before the gold answer"),
        ("question", "not JSON"),
    ],
)
def test_a_malformed_line_is_named(files, line, message):
    with (files / "test.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=rf"test\.jsonl, line 31: {message}"):
        load(files, "test")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data_path: .*train\.jsonl cannot be read \(No such file or directory\)"):
        load(tmp_path, "train")
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"data_path: .*mine\.jsonl is a file: must be a directory"):
        load(tmp_path / "mine.jsonl", "train")


def test_the_hub_is_asked_for_the_main_configuration(monkeypatch):
    asked = []
    rows = {"train": [row(i) for i in range(20)], "test": [row(99)]}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, split, revision: asked.append((*args, split)) or rows[split]
    )
    assert questions(load(None, "test", num_shots=2)) == ["What is 99 * 2?"]
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"'openai/gsm8k' could not be read .*no route.* set data_path"):
        load(None, "train")


@pytest.mark.skipif("GRPO_TEST_DATA" not in os.environ, reason="GRPO_TEST_DATA names no folder of real data")
def test_the_real_files():
    path = Path(os.environ["GRPO_TEST_DATA"]) / "gsm8k"
    train, validation, test = (load(path, split, num_shots=8, seed=1) for split in SPLITS)
    shots = test[0].info["shots"]
    assert len(train) + len(validation) == 7473 - 8 and 492 <= len(validation) <= 500 and len(test) == 1319
    apart = [set(questions(problems)) for problems in (train, validation, test)]
    assert len(set.union(*apart)) == sum(map(len, apart)) == len(train) + len(validation) + len(test)
    assert sum("," in problem.answer for problem in test) == 14 and test[0].answer == "18"
    assert all("<<" not in p.info["solution"] and ">>" not in p.prompt for p in train + validation + test)
    rows = [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]
    shortest = sorted(rows, key=lambda one: len(one["question"]) + len(one["answer"]))[:64]
    assert {shot["question"] for shot in shots} <= {one["question"] for one in shortest}
    assert gsm8k.load("test", path=str(path), num_shots=8, seed=1) == test
