"""The loop in docs/library.md, as it stands but for a smaller model: it runs, and learns what a Learner learns."""

import re
from pathlib import Path

import pytest
import torch

from grpo.config import Config
from grpo.metrics import Sums
from grpo.policy import load_policy
from grpo.update import Learner
from tests.fakes import runs

PAGE = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
(LOOP,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[str, str]:
    """A model and its problems."""
    place = tmp_path_factory.mktemp("digits")
    return runs.save_digits(place / "model"), runs.write_problems(place / "data")


def run(digits, max_tokens: int) -> dict:
    """The names that the loop leaves, with another token budget, after a single step."""
    model, problems = digits
    changes = {
        'load_policy("embedded")': f'load_policy("{model}", precision="fp64")',
        'data.load("arithmetic", "train")': f'data.load("jsonl", "train", path="{problems}")',
        "gsm8k.correctness": "gsm8k.last_number",
        "range(1, 4)": "range(1, 2)",
        "torch.float32": "torch.float64",
        "**counts)": "**counts, dtype=torch.float64)",
        "max_tokens=2048": f"max_tokens={max_tokens}",
        "torch.optim.AdamW(policy.parameters(), lr=2e-4)": "torch.optim.SGD(policy.parameters(), lr=1.0)",
    }
    loop = LOOP
    for before, after in changes.items():
        assert loop.count(before) == 1, before
        loop = loop.replace(before, after)
    names: dict = {}
    exec(loop, names)
    return names


def test_the_loop_of_the_page_makes_the_update_that_a_learner_makes(digits, capsys):
    whole, cut = run(digits, 2048), run(digits, 30)
    assert re.fullmatch(r"(1 0\.\d+\n){2}", capsys.readouterr().out) and len(LOOP.splitlines()) < 45
    policy, _ = load_policy(digits[0], precision="fp64")
    sizes = {"group_size": 8, "max_new_tokens": 64, "max_tokens_per_microbatch": 500, "max_grad_norm": 0.0}
    learner = Learner(Config(**sizes, learning_rate=1.0, precision="fp64"), policy, None)
    learner.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    sums = Sums()
    learner.learn(whole["batch"], 1, sums)
    assert sums.reduce()["optim/grad_norm"] > 1e-3
    for theirs in (whole["policy"], cut["policy"]):
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(parameter, policy.get_parameter(name), rtol=1e-9, atol=1e-12)
