"""One's own JSON lines: the fields, the splits of a file and of a directory, and an error for each thing wrong."""

import json

import pytest

import data


def write(file, *rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def numbered(n: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"p{i}", "answer": str(i)} for i in range(start, start + n)]


def splits(path, seed: int = 0) -> list[list[str]]:
    names = ("train", "validation", "test")
    return [[problem.prompt for problem in data.load("jsonl", split, path=path, seed=seed)] for split in names]


def test_fields_of_a_line(tmp_path):
    rows = [
        {"prompt": " as it is\n", "answer": "1,080"},
        {"prompt": "b", "answer": 18, "stop": ["\n\n", "END"], "question": "b?", "level": 3, "tags": ["x"]},
        {"prompt": "Ünïcode 日本", "answer": -2.5},
    ]
    write(tmp_path / "test.jsonl", *rows)
    first, second, third = data.load("jsonl", "test", path=tmp_path)
    assert (first.prompt, first.answer) == (" as it is\n", "1,080")
    assert first.info == {"question": " as it is\n", "shots": [], "stop": []}
    assert (second.prompt, second.answer) == ("b", "18")
    assert second.info == {"question": "b?", "shots": [], "stop": ["\n\n", "END"], "level": 3, "tags": ["x"]}
    assert (third.prompt, third.answer) == ("Ünïcode 日本", "-2.5")


def test_a_directory_keeps_its_test_file_whole(tmp_path):
    write(tmp_path / "train.jsonl", *numbered(50))
    write(tmp_path / "test.jsonl", *numbered(20, start=100))
    train, validation, test = splits(tmp_path)
    assert test == [f"p{i}" for i in range(100, 120)]
    assert (len(train), len(validation)) == (45, 5)
    assert sorted(train + validation) == sorted(f"p{i}" for i in range(50))


def test_a_single_file_is_divided_in_three(tmp_path):
    path = write(tmp_path / "all.jsonl", *numbered(100))
    train, validation, test = splits(path)
    assert (len(train), len(validation), len(test)) == (81, 9, 10)
    assert sorted(train + validation + test) == sorted(f"p{i}" for i in range(100))
    assert splits(path) == [train, validation, test]
    assert splits(path, seed=1)[2] != test


def test_equal_prompts_stay_on_one_side(tmp_path):
    path = write(tmp_path / "all.jsonl", *numbered(40), *numbered(40))
    train, validation, test = map(set, splits(path))
    assert len(train) + len(validation) + len(test) == len(train | validation | test) == 40


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        ("[1]", r"not a JSON object but \[1\]"),
        ('{"answer": "a"}', "'prompt' must be a string, not None"),
        ('{"prompt": 1, "answer": "a"}', "'prompt' must be a string, not 1"),
        ('{"prompt": "p"}', "'answer' must be a string or a number, not None"),
        ('{"prompt": "p", "answer": true}', "'answer' must be a string or a number, not True"),
        ('{"prompt": "p", "answer": ["a"]}', "'answer' must be a string or a number"),
        ('{"prompt": "p", "answer": "a", "question": 1}', "'question' must be a string, not 1"),
        ('{"prompt": "p", "answer": "a", "stop": "END"}', "'stop' must be a list of strings, none empty, not 'END'"),
        ('{"prompt": "p", "answer": "a", "stop": [""]}', "'stop' must be a list of strings"),
        ('{"prompt": "p", "answer": "a", "shots": [1]}', "'shots' is reserved"),
        ('{"prompt": "p", "answer": "a\\ud800"}', "'.ud800' is half of a character"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    good = b'{"prompt": "p", "answer": "a"}\n\n'
    (tmp_path / "test.jsonl").write_bytes(good + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match=rf"test\.jsonl, line 3: {message}"):
        data.load("jsonl", "test", path=tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    lines = b'{"prompt": "p", "answer": "a"}\r\n{"prompt": "q", "answer": "b"}\r\n'
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    assert [problem.prompt for problem in data.load("jsonl", "test", path=tmp_path)] == ["p", "q"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data_path: .*train\.jsonl cannot be read \(No such file or directory\)"):
        data.load("jsonl", "train", path=tmp_path)
    with pytest.raises(ValueError, match=r"data_path: .*nothing\.jsonl cannot be read"):
        data.load("jsonl", "train", path=tmp_path / "nothing.jsonl")


def test_a_path_is_needed_and_shots_are_not_to_be_had(tmp_path):
    with pytest.raises(ValueError, match=r"data_path: data 'jsonl' needs"):
        data.load("jsonl", "train")
    with pytest.raises(ValueError, match=r"num_shots: 2 is not 0"):
        data.load("jsonl", "train", path=tmp_path, num_shots=2)
