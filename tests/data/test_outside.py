"""A Python file anywhere is imported once, with those beside it; what can not be imported is a sentence."""

import sys

import pytest

import data
from data.outside import import_file


def test_a_file_is_run_once_and_may_import_those_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_of_a_user.py").write_text("value = 7\n")
    (file := tmp_path / "own.py").write_text("import beside_of_a_user\n\nruns = [beside_of_a_user.value]\n")
    module = import_file(str(file), "data")
    assert module.runs == [7] and sys.modules[module.__name__] is module
    monkeypatch.chdir(tmp_path)
    assert import_file("own.py", "data") is module


def test_files_of_one_name_are_two_modules(tmp_path):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "own.py").write_text(f"value = {i}\n")
    assert [import_file(str(tmp_path / str(i) / "own.py"), "data").value for i in range(2)] == [0, 1]


def test_a_file_that_is_missing_or_broken_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=rf"^rewards: there is no Python file {tmp_path}/gone\.py; was it moved"):
        import_file(str(tmp_path / "gone.py"), "rewards")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"broken\.py cannot be imported \(ZeroDivisionError: division by zero\)"):
            import_file(str(tmp_path / "broken.py"), "data")


def test_a_data_set_may_lie_anywhere_and_ask_for_options(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from data.problem import Problem\n\n\n"
        "def load(split, *, path, num_shots, seed, answer_rule='none'):\n"
        "    return [Problem(split, str(seed), {'rule': answer_rule})]\n"
    )
    (problem,) = data.load(str(file), "test", seed=3, answer_rule="boxed")
    assert (problem.prompt, problem.answer, problem.info) == ("test", "3", {"rule": "boxed"})
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"empty\.py has no function load\(split, \*, path, num_shots, seed\)"):
        data.load(str(tmp_path / "empty.py"), "test")
