"""Data of others: files of every kind, directories as they come, the hub, columns, chat prompts, answers by a rule."""

import csv
import gzip
import io
import json
import sys

import pytest

import data
from data.hub import reader

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")


def rows(n: int, start: int = 0) -> list[dict]:
    return [{"question": f"{i}+1?", "answer": f"so\n#### {i + 1}", "level": i % 3} for i in range(start, start + n)]


def as_csv(given: list[dict], separator: str = ",") -> bytes:
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, list(given[0]), delimiter=separator)
    table.writeheader()
    table.writerows(given)
    return file.getvalue().encode()


def as_arrow(given: list[dict], new=pyarrow.ipc.new_file) -> bytes:
    table, file = pyarrow.Table.from_pylist(given), io.BytesIO()
    with new(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


KINDS = {
    "a.csv": as_csv,
    "semicolons.csv": lambda given: as_csv(given, ";"),
    "a.tsv": lambda given: as_csv(given, "\t"),
    "a.csv.gz": lambda given: gzip.compress(as_csv(given)),
    "a.arrow": as_arrow,
    "stream.arrow": lambda given: as_arrow(given, pyarrow.ipc.new_stream),
    "a.jsonl": lambda given: "\n".join(map(json.dumps, given)).encode(),
}
"""JSON arrays, parquet and other encodings are tested in test_jsonl.py: one function reads the rows of both."""


@pytest.mark.parametrize("name", KINDS)
def test_one_file_of_any_kind_is_divided_in_three(tmp_path, name):
    (tmp_path / name).write_bytes(KINDS[name](rows(40)))
    parts = [data.load("hub", split, path=tmp_path / name, answer_rule="after_hashes") for split in data.SPLITS]
    assert list(map(len, parts)) == [32, 4, 4]
    found = sorted((problem for part in parts for problem in part), key=lambda problem: int(problem.answer))
    assert [(problem.prompt, problem.answer) for problem in found] == [(f"{i}+1?", str(i + 1)) for i in range(40)]
    assert {str(problem.info["level"]) for problem in found} == {"0", "1", "2"}


def test_a_directory_as_the_hub_and_the_library_write_it(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.csv").write_bytes(as_csv(rows(10)))
    (shards := tmp_path / "shards" / "data").mkdir(parents=True)
    for i in range(2):
        table = pyarrow.Table.from_pylist(rows(5, start=5 * i))
        pyarrow.parquet.write_table(table, shards / f"train-0000{i}-of-00002.parquet")
    (shards / "training_notes.csv").write_text("no data")
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows(10))})
    whole.save_to_disk(tmp_path / "saved")
    for place in ("plain", "shards", "saved"):
        found = [problem.prompt for split in data.SPLITS for problem in data.load("hub", split, path=tmp_path / place)]
        assert sorted(found) == [f"{i}+1?" for i in range(10)], place


def test_splits_that_are_there_are_kept_whole(tmp_path):
    for i, split in enumerate(data.SPLITS):
        (tmp_path / f"{split}.csv").write_bytes(as_csv(rows(7, start=10 * i)))
    assert [len(data.load("hub", split, path=tmp_path)) for split in data.SPLITS] == [7, 7, 7]
    (tmp_path / "train.csv").unlink()
    assert len(data.load("hub", "test", path=tmp_path)) == 7
    with pytest.raises(ValueError, match=r"has the splits validation, test, so there is no 'train' split"):
        data.load("hub", "train", path=tmp_path)


def hub(monkeypatch, tables: dict[str, list[dict]]) -> list:
    """A hub with one data set. Returns the calls that are made."""
    calls = []

    def load_dataset(name, config, *, split, revision):
        calls.append((name, config, split, revision))
        found = {part: datasets.Dataset.from_list(given) for part, given in tables.items()}
        return found[split] if split else datasets.DatasetDict(found)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("path", "call", "size"),
    [
        ("org/name", ("org/name", None, None, None), 4),
        ("org/name:main", ("org/name", "main", None, None), 4),
        ("org/name:main:extra", ("org/name", "main", "extra", None), 2),
        ("org/name::extra@v1", ("org/name", None, "extra", "v1"), 2),
        ("org/name@refs/pr/1", ("org/name", None, None, "refs/pr/1"), 4),
        ("squad", ("squad", None, None, None), 4),
    ],
)
def test_a_name_on_the_hub_may_have_configuration_split_and_revision(monkeypatch, tmp_path, path, call, size):
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch, {"train": rows(20), "test": rows(4, start=50), "extra": rows(20, start=100)})
    assert len(data.load("hub", "test", path=path)) == size
    assert calls == [call]


def test_a_hub_that_fails_is_one_sentence(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = r"^data_path: 'org/name' could not be read .* \(ConnectionError: no route to host\); it is no file here"
    with pytest.raises(ValueError, match=said):
        data.load("hub", "train", path="org/name:main")


@pytest.mark.parametrize("path", ["my/problems.csv", "./problems", "/no/such", "a/b/c"])
def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(monkeypatch, path):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match=r"data_path: .* cannot be read \(No such file or directory\)"):
        data.load("hub", "train", path=path)


def test_a_row_keeps_its_types_and_dates_become_texts(monkeypatch):
    from datetime import datetime

    hub(monkeypatch, {"train": [{"problem": "1+1?", "answer": 2, "when": datetime(2024, 1, 2), "tags": ["a"]}] * 2})
    (problem, *_) = data.load("hub", "train", path="org/name")
    assert (problem.prompt, problem.answer) == ("1+1?", "2")
    assert problem.info["when"] == "2024-01-02 00:00:00" and problem.info["tags"] == ["a"]


def load(tmp_path, row: dict, **options):
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = data.load("hub", "train", path=tmp_path, **options)
    return problem


def test_columns_are_found_by_usual_names_or_named(tmp_path):
    assert load(tmp_path, {"problem": "p", "solution": "s"}).answer == "s"
    row = {"text": "t", "prompt": "p", "gold": {"truth": 7}, "answer": "a"}
    assert load(tmp_path, row).answer == "a"
    problem = load(tmp_path, row, prompt_column="text", answer_column="gold.truth")
    assert (problem.prompt, problem.info["question"], problem.answer) == ("t", "t", "7")


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        (
            {"text": "t", "answer": "a"},
            {},
            r"no prompt or question or problem; its fields are 'text', 'answer'; name one",
        ),
        ({"prompt": "p", "gold": "a"}, {}, r"no answer or solution; its fields are 'prompt', 'gold'; .* answer_column"),
        (
            {"prompt": "p", "answer": "a"},
            {"answer_column": "gold"},
            r"answer_column is 'gold', which is not there; its",
        ),
        ({"prompt": "p", "a": {}}, {"answer_column": "a.b"}, r"answer_column is 'a\.b', which is not there"),
        ({"prompt": "p", "answer": "a"}, {"answer_rule": "boxed"}, r"answer_rule finds no answer in 'a'"),
        ({"prompt": "p", "answer": ["a"]}, {}, r"'answer' must be a string or a number"),
        ({"prompt": [], "answer": "a"}, {}, r"the last message of a prompt must be the user's"),
        ({"prompt": [{"role": "bot", "content": ""}], "answer": "a"}, {}, r"must have a role \(system, user, assis"),
        ({"prompt": [{"role": "user", "content": [1]}], "answer": "a"}, {}, r"a role .* and a text, not"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "a"}, {}, r"must be the user's"),
    ],
)
def test_a_row_that_can_not_be_used_is_a_sentence(tmp_path, row, options, said):
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 1: .*{said}"):
        load(tmp_path, row, **options)


def test_a_prompt_of_chat_messages(tmp_path):
    system, user = {"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?", "name": "Ada"}
    problem = load(tmp_path, {"prompt": [system, user], "answer": 2})
    assert (problem.prompt, problem.info["system"]) == ("1+1?", "Be short.") and "turns" not in problem.info
    turns = [user, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"}]
    problem = load(tmp_path, {"prompt": turns, "answer": 4})
    assert problem.info["turns"] == [{"role": "user", "content": "1+1?"}, *turns[1:]]
    assert (problem.info["question"], problem.info.get("system")) == ("2+2?", None)


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        (None, " as it is ", " as it is "),
        ("as_is", "a", "a"),
        ("after_hashes", "#### 1\n#### 1,080\n", "1,080"),
        ("after_hashes", "no mark", None),
        ("boxed", r"so \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"the set \boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{\frac{1}{2}", None),
        ("boxed", "}", None),
        ("regex:answer: (\\d+)", "answer: 1, answer: 22", "22"),
        ("regex:[A-D]$", "It is C", "C"),
        ("regex:x", "a", None),
    ],
)
def test_rules_for_answers(rule, text, answer):
    assert reader(rule)(text) == answer


@pytest.mark.parametrize("rule", ["box", "regex:", "regex", "after", "as_is:x"])
def test_an_unknown_rule_lists_the_known_ones(rule):
    with pytest.raises(ValueError, match=r"answer_rule: .* must be as_is, after_hashes, boxed or regex:PATTERN"):
        reader(rule)
    with pytest.raises(ValueError, match=r"answer_rule: '\(' is no regular expression"):
        reader("regex:(")


def test_csv_that_is_wrong_is_a_sentence(tmp_path):
    for content, said in (
        (b"question,answer\na,b,c\n", r"row 1: 3 values for 2 columns"),
        (b"question,question\na,b\n", r"two columns of the same name"),
        (b'question,answer\n"a"b,c\n', r"line 2: not CSV"),
        (b"question,answer\n\xff\xfa,b\n", r"is not UTF-8"),
    ):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            data.load("hub", "train", path=tmp_path / "a.csv")


def test_what_is_needed_and_what_is_not_to_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data_path: data 'hub' needs org/name"):
        data.load("hub", "train")
    with pytest.raises(ValueError, match=r"num_shots: 2 is not 0"):
        data.load("hub", "train", path=tmp_path, num_shots=2)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"has no file for train, validation or test; it holds notes\.txt"):
        data.load("hub", "train", path=tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.arrow").write_bytes(as_arrow(rows(2)))
    with pytest.raises(ValueError, match=r"is an Arrow file, which needs the package pyarrow"):
        data.load("hub", "train", path=tmp_path / "a.arrow")
