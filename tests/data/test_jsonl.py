"""One's own JSON lines: the fields, the splits of a file and of a directory, and an error for each thing wrong."""

import bz2
import gzip
import io
import json
import lzma
import sys

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


def as_array(rows: list[dict]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_lines(rows: list[dict], encoding: str = "utf-8") -> bytes:
    return "\n".join(map(json.dumps, rows)).encode(encoding)


def as_parquet(rows: list[dict]) -> bytes:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), file)
    return file.getvalue()


KINDS = {
    "array.json": as_array,
    "one-line-array.json": lambda rows: json.dumps(rows).encode(),
    "table.parquet": as_parquet,
    "named-otherwise.jsonl": as_parquet,
    "lines.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "array.json.gz": lambda rows: gzip.compress(as_array(rows)),
    "lines.jsonl.bz2": lambda rows: bz2.compress(as_lines(rows)),
    "lines.jsonl.xz": lambda rows: lzma.compress(as_lines(rows)),
    "windows.jsonl": lambda rows: as_lines(rows, "utf-16"),
    "no-mark.jsonl": lambda rows: as_lines(rows, "utf-16-le"),
    "big-endian.jsonl": lambda rows: as_lines(rows, "utf-16-be"),
    "windows-array.json": lambda rows: json.dumps(rows, indent=1).encode("utf-16"),
    "wide.jsonl": lambda rows: as_lines(rows, "utf-32"),
}


@pytest.mark.parametrize("name", KINDS)
def test_c69_files_of_other_kinds_are_read(tmp_path, name):
    """The kind: data as it comes from the hub or from another system ends in an error about a byte or a column.

    Siblings: compressed files, UTF-16 and UTF-32 with and without a mark, arrays, parquet; a file and a directory.
    """
    rows = [{"prompt": f"{i}+1= \u00e9", "answer": i + 1, "stop": ["\n"], "level": {"deep": [i]}} for i in range(40)]
    (tmp_path / name).write_bytes(KINDS[name](rows))
    write(tmp_path / "plain.jsonl", *rows)
    for split in ("train", "validation", "test"):
        expected = data.load("jsonl", split, path=tmp_path / "plain.jsonl")
        assert data.load("jsonl", split, path=tmp_path / name) == expected


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "jsonl.gz"])
def test_c69_a_directory_may_hold_files_of_other_kinds(tmp_path, ending):
    as_kind = {"jsonl": as_lines, "json": as_array, "parquet": as_parquet, "jsonl.gz": KINDS["lines.jsonl.gz"]}[ending]
    for split in ("train", "test"):
        (tmp_path / f"{split}.{ending}").write_bytes(as_kind(numbered(20, start=100 * (split == "test"))))
    assert splits(tmp_path)[2] == [f"p{i}" for i in range(100, 120)]
    for split in ("train", "test"):
        rows = [{"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(20)]
        (tmp_path / f"{split}.{ending}").write_bytes(as_kind(rows))
    assert data.load("gsm8k", "test", path=tmp_path)[3].answer == "3"


READS = r"; JSON lines \(one object on each line\), a JSON array, parquet, Arrow, and CSV in a file named \.csv"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prompt,answer\n1+1=,2\n", rf"is CSV \(its columns are 'prompt', 'answer'\){READS}"),
        (b"prompt\tanswer\n1+1=\t2\n", rf"is tab-separated text \(its columns are 'prompt', 'answer'\){READS}"),
        (b'{\n "train": [],\n "test": []\n}', rf"is one JSON object over several lines \(.* 'train', 'test'\){READS}"),
        (b"PK\x03\x04...", r"is a zip archive"),
        (b"\x28\xb5\x2f\xfd...", r"is compressed with zstd"),
        (b"ARROW1\0\0", r"is an Arrow file, and damaged"),
        (b"\xff\xff\xff\xff\0\0", r"is an Arrow stream, and damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"is a pointer of Git LFS"),
        (b"\n<!doctype html>", r"is HTML or XML"),
        (b"\x80\x02}q\0\0", r"is neither text nor parquet"),
        (b"\x10\0\0\0\0\0\0\0{}", r"is neither text nor parquet"),
        (b"\x1f\x8b\x08\0damaged", r"is compressed, and damaged"),
        (b"PAR1damaged", r"is parquet, and damaged"),
        (b"\xff\xfe{", r"is neither text nor parquet"),
        (b"[1, 2]", r"a\.any, row 1: not a JSON object but 1"),
        ('{"prompt": "\u00e9", "answer": 1}'.encode("latin-1"), r"line 1: not JSON, because it is not UTF-8; save the"),
        (b'[{"prompt": "a"}]', r"a\.any, row 1: 'answer' must be a .*, not None; its fields are 'prompt'"),
        (b'{"question": "q", "answer": "a"}', r"line 1: 'prompt' must .* None; its fields are 'question', 'answer'$"),
        (b'{"question": "q", "answer": "#### 1"}', r"'answer'; rows of GSM8K's form are read by --data gsm8k"),
        (b"{}", r"line 1: 'prompt' must be a string, not None; it has no fields"),
        (b'{"prompt": "a", "answer": "1", "answer": "2"}', r"line 1: not JSON \('answer' stands there twice\)"),
        (b'{"prompt": "a", "answer": NaN}', r"line 1: 'answer' must be a string or a finite number, not nan"),
        (b'{"prompt": ' + b"[" * 100_000, r"line 1: not JSON"),
    ],
)
def test_c69_what_is_not_read_is_a_sentence_that_says_what_it_is(tmp_path, content, said):
    (tmp_path / "a.any").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        data.load("jsonl", "train", path=tmp_path / "a.any")


def test_c69_a_directory_without_the_file_says_what_it_holds(tmp_path):
    for name in ("a.csv", "train-00000-of-00001.parquet"):
        (tmp_path / name).write_text("")
    for name in ("jsonl", "gsm8k"):
        with pytest.raises(ValueError, match=r"train\.jsonl cannot be read .* holds a\.csv, train-00000-of"):
            data.load(name, "train", path=tmp_path)


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


def test_c69_a_field_that_is_null_counts_as_missing(tmp_path):
    """The kind: as above. Parquet has a value in every column of every row."""
    rows = [{"prompt": f"{i}+1=", "answer": i + 1, "stop": None, "question": None, "note": None} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problem = data.load("jsonl", "train", path=tmp_path / "a.jsonl")[0]
    assert problem.info == {"question": problem.prompt, "shots": [], "stop": []}
