"""`rewards.load`: a name is a file and a function; any other name is an error that lists the known ones."""

import re
import subprocess
import sys

import pytest

import rewards
from data.problem import Problem
from rewards import gsm8k, gsm8k_published
from rewards.runner import RewardRunner


def test_a_name_is_a_function_of_a_file():
    assert rewards.load("gsm8k.format") is gsm8k.format
    assert rewards.load("gsm8k_published.correctness") is gsm8k_published.correctness


@pytest.mark.parametrize(
    "name",
    ["", "gsm8k", "gsm8k.", ".format", "gsm8k.nothing", "nothing.format", "gsm8k.format.more", "gsm8k.Problem"]
    + ["gsm8k.TOLERANCE", "gsm8k_published._first_answer", "runner.RewardRunner", "worker.main", "__init__.load"],
)
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        rewards.load(name)
    assert repr(name) in str(error.value)
    known = str(error.value).partition("is not one of ")[2].split(", ")
    assert {"gsm8k.correctness", "gsm8k.format", "gsm8k_published.correctness", "gsm8k_published.format"} <= set(known)
    assert not any(listed.startswith(("runner.", "worker.")) or "._" in listed for listed in known)


@pytest.mark.parametrize("source", ["1 / 0", "def reward(:", "import no_such_module"])
def test_a_file_that_cannot_be_imported_is_named_and_harms_no_other(source, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(source)
    files = rewards._files()
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    monkeypatch.setattr(rewards, "_files", lambda: [*files, tmp_path / "broken.py"])
    with pytest.raises(ValueError, match=r"'broken\.reward': rewards/broken\.py cannot be imported \(.+\)"):
        rewards.load("broken.reward")
    with pytest.raises(ValueError, match=r"gsm8k\.format"):
        rewards.load("gsm8k.nothing")
    assert rewards.load("gsm8k.format") is gsm8k.format


FUNCTIONS = {
    "def good(completion, problem):\n    return 1.0": "",
    "def good(completion: str, problem: Problem) -> float:\n    return 1.0": "",
    "def good(completion: str, problem: Problem, *, loosely: bool = False) -> float | None:\n    return 1.0": "",
    "def good(completion, problem) -> 'int':\n    return 1": "",
    "def good(c, problem) -> bool:\n    return True": "",
    "def helper(completion: str) -> float:\n    return 1.0": "its arguments are completion",
    "def helper(completion, problem, pattern):\n    return 1.0": "its arguments are completion, problem, pattern",
    "def helper(completion, problem, *, pattern):\n    return 1.0": "its arguments are completion, problem, pattern",
    "def good(completion, problem, *, length, cap):\n    return 1.0": "",
    "def good(completion, problem, tokens, finished, *, cache=9) -> float:\n    return 1.0": "",
    "def helper(completion, problem, *, lenght):\n    return 1.0": "its arguments are completion, problem, lenght; "
    "beside the first two it may ask for tokens, length, cap, finished, whole, chat",
    "def helper(completion, problem, length, pattern):\n    return 1.0": "its arguments are completion, problem, "
    "length, pattern; beside the first two",
    "def helper():\n    return 1.0": "its arguments are none",
    "def helper(completion: str, problem: Problem) -> str:\n    return completion": "it returns str",
    "def helper(completion, problem) -> tuple[str, bool]:\n    return '', True": "it returns tuple[str, bool]",
    "def helper(completion, problem) -> 'list[str]':\n    return []": "it returns",
    "async def helper(completion, problem):\n    return 1.0": "it is async",
    "def good(completion, problem) -> 'Literal[0, 1]':\n    return 1": "",
    "from rewards.gsm8k import correctness as helper": "rewards/others.py only imports it",
    "from os.path import commonprefix as helper": "rewards/others.py only imports it",
}


@pytest.mark.parametrize(("source", "reason"), FUNCTIONS.items())
def test_c72_only_a_function_of_completion_and_problem_that_returns_a_number_is_a_reward(
    source, reason, tmp_path, monkeypatch
):
    """The kind: whatever is public in a file of rewards is listed and loaded as one.

    Siblings: helpers of other arguments, helpers that return a text or a pair, functions that are only imported.
    """
    (tmp_path / "others.py").write_text(f"from data.problem import Problem\n\n\n{source}\n")
    files = rewards._files()
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    monkeypatch.setattr(rewards, "_files", lambda: [*files, tmp_path / "others.py"])
    monkeypatch.delitem(sys.modules, "rewards.others", raising=False)
    name = "others.helper" if reason else "others.good"
    assert (name in rewards._known()) == (not reason)
    if not reason:
        assert callable(rewards.load(name))
        return
    with pytest.raises(ValueError) as error:
        rewards.load(name)
    assert str(error.value).startswith(f"rewards: {name!r} is a helper, not a reward ({reason}")
    assert re.search(r"\(completion, problem\) -> float, such as .*gsm8k.format, gsm8k.correctness", str(error.value))


def test_a_misspelt_name_gets_the_near_one():
    for name in ("gsm8k.corectness", "gsmk.correctness"):
        with pytest.raises(ValueError, match=r"; did you mean gsm8k\.correctness\?"):
            rewards.load(name)


def test_c72_the_helpers_of_our_own_files_are_no_rewards():
    assert [name for name in rewards._known() if name.startswith("gsm8k")] == [
        *("gsm8k.format", "gsm8k.correctness", "gsm8k.last_number"),
        *("gsm8k_published.format", "gsm8k_published.correctness"),
    ]
    with pytest.raises(ValueError, match=r"'gsm8k\.marked_number' is a helper, not a reward \(its arguments are compl"):
        rewards.load("gsm8k.marked_number")


def test_only_what_is_named_is_asked_for():
    assert rewards.asks_for(lambda completion, problem, *, cap, other=1, tokens: 0) == ("cap", "tokens")
    assert rewards.asks_for(lambda completion, problem, length, /, **finished: 0) == ()
    assert rewards.asks_for(lambda tokens, length: 0) == ()  # the first two are the completion and the problem
    assert rewards.asks_for(gsm8k.correctness) == rewards.asks_for(min) == ()


def test_c71_a_reward_states_its_full_value(monkeypatch):
    assert (rewards.full_value("gsm8k.format"), rewards.full_value("gsm8k.correctness")) == (0.5, 1.0)
    assert rewards.full_value("gsm8k_published.format") == 0.5
    monkeypatch.setattr(gsm8k.format, "full_value", "half")
    with pytest.raises(ValueError, match=r"rewards: full_value of 'gsm8k\.format' is 'half': must be a finite number"):
        rewards.full_value("gsm8k.format")


def test_rewards_and_data_import_neither_torch_nor_grpo():
    heavy = "{'torch', 'grpo', 'numpy', 'datasets', 'transformers'}"
    code = f"import sys, rewards.runner, data.gsm8k, data.jsonl; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


OWN = """
from rewards.gsm8k import correctness

def short(completion, problem):
    return 1 / (1 + len(completion))

def of_trl(prompts, completions, answer, **columns) -> list[float]:
    return [float(text.endswith(gold)) for text, gold in zip(completions, answer)]

def helper(text):
    return text

async def later(completions, **columns):
    return [0.0]

short.full_value = 0.5
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_a_file_outside_is_named_by_its_path(own):
    assert rewards.load(f"{own}:short")("a", None) == 0.5 and rewards.full_value(f"{own}:short") == 0.5
    assert rewards.label(f"{own}:short") == "own.short" and rewards.label("gsm8k.format") == "gsm8k.format"
    assert rewards.module_of("gsm8k.format") == "rewards.gsm8k"
    assert sys.modules[rewards.module_of(f"{own}:short")].__file__ == own


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("shor", r"own\.py:shor' is not one of .*own\.py:short, .*own\.py:of_trl; did you mean .*own\.py:short\?$"),
        ("", r"is not one of .*own\.py:short"),
        ("helper", r"is a helper, not a reward \(its arguments are text\)"),
        ("later", r"is a helper, not a reward \(it is async\)"),
        ("correctness", r"own\.py only imports it"),
    ],
)
def test_what_a_file_outside_does_not_have_is_said_with_what_it_has(own, function, said):
    with pytest.raises(ValueError, match=said):
        rewards.load(f"{own}:{function}")


def test_a_file_outside_that_is_missing_is_said():
    with pytest.raises(ValueError, match=r"rewards: there is no Python file /no/such\.py"):
        rewards.load("/no/such.py:reward")


def test_a_worker_calls_rewards_of_files_outside_in_either_form(own):
    with RewardRunner([f"{own}:short", f"{own}:of_trl"], timeout=5) as runner:
        assert runner.score(["so 18", "a"], [Problem("", "18", {})] * 2) == [[1 / 6, 0.5], [1.0, 0.0]]
        assert not runner.failures


def test_two_rewards_of_one_name_are_refused(own, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "own.py").write_text(OWN)
    with pytest.raises(ValueError, match=r"are both own\.short in metrics; rename one"):
        RewardRunner([f"{own}:short", f"{tmp_path}/other/own.py:short"], timeout=5)
