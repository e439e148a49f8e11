"""`rewards.load`: a name is a file and a function; any other name is an error that lists the known ones."""

import subprocess
import sys

import pytest

import rewards
from rewards import gsm8k, gsm8k_published


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


def test_rewards_and_data_import_neither_torch_nor_grpo():
    heavy = "{'torch', 'grpo', 'numpy', 'datasets', 'transformers'}"
    code = f"import sys, rewards.runner, data.gsm8k, data.jsonl; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
