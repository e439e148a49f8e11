"""Text files appear whole or not at all; a directory is one process's."""

import os

import pytest

from grpo import files
from grpo.files import lock_directory, read_object, write_whole


def test_c58_files_get_the_mode_that_umask_gives(tmp_path):
    """Kind: a library writes through a temporary file, which no other user may read."""
    (tmp_path / "deep").mkdir()
    for path in (tmp_path / "a", tmp_path / "deep" / "b"):
        path.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        files.give_usual_mode(tmp_path)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "deep" / "b")] == [0o640] * 2


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "config.yaml"
    write_whole(path, "one\n")
    write_whole(path, "Zwölf Boxkämpfer\u2028\n")
    assert path.read_bytes() == "Zwölf Boxkämpfer\u2028\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
    write_whole(path, b"\xff\r\n")
    assert path.read_bytes() == b"\xff\r\n"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_error_on_the_way_leaves_the_old_file_and_says_which(tmp_path, monkeypatch, broken):
    path = tmp_path / "metrics.jsonl"
    write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError) as raised:
        write_whole(path, "new")
    assert str(raised.value) == f"cannot write {path} (No space left on device)"
    assert path.read_text() == "old"


def test_the_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So that no crash leaves an empty file under the name of a full one."""
    path, done = tmp_path / "x.json", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *a: done.append(a[1].exists()) or replace(*a))
    write_whole(path, "12345")
    assert done == [5, False]


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*nowhere/x \(No such file or directory\)"):
        write_whole(tmp_path / "nowhere" / "x", "")


def test_a_directory_is_one_users_until_he_lets_go(tmp_path):
    held = lock_directory(tmp_path)
    with pytest.raises(ValueError, match="run_name: another process works in"):
        lock_directory(tmp_path)
    os.close(held)
    os.close(lock_directory(tmp_path))


def test_where_there_are_no_locks_a_directory_is_free(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("grpo.files.fcntl.flock", refuse)
    os.close(lock_directory(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": 1', "f, line 3: not JSON ("),
        (b"\xff\xfe", "f, line 3: not JSON ("),
        (b"[]", "f, line 3: must be a JSON object, not []"),
        (b"{}", "f, line 3: lacks 'a'"),
        (b'{"a": "x"}', "f, line 3: a is 'x': must be of type int | None"),
    ],
)
def test_an_object_that_is_none_is_one_sentence(text, said):
    with pytest.raises(ValueError) as error:
        read_object(text, "f, line 3", {"a": int | None})
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_an_object_is_read_without_numbers_that_json_lacks():
    assert read_object(b'{"a": NaN, "b": 1e999, "c": 0.5}', "f", {"a": None | float}) == {
        "a": None,
        "b": None,
        "c": 0.5,
    }
