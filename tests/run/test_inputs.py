"""What a run is made of beside its options: remembered, and compared when it goes on."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch

from data.problem import Problem
from grpo import distributed
from grpo.config import Config
from grpo.run import inputs
from tests.fakes import runs
from tests.fakes.models import tiny_policy

PROBLEMS = [Problem("1+1=", "2", {"stop": []}), Problem("2+2=", "4", {"stop": []})]
CONFIG = Config(rewards=("gsm8k.format",), reward_weights=(1.0,), model="some/name")


def made_of(**changes) -> dict:
    return inputs.look(CONFIG, {"model": "weights", "commit": "abc"}, PROBLEMS, [[1, 2], [3]]) | changes


def resumed(tmp_path, now: dict, step: int = 3, config: Config = CONFIG) -> None:
    inputs.check(tmp_path, config, 0, made_of())
    inputs.check(tmp_path, config, step, now)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "other"}, "warning: data: the training problems of 'arithmetic' have changed after step 3"),
        ({"prompts": "other"}, "warning: model: the same problems become other prompts since step 3"),
        ({"rewards": {"gsm8k.format": "other"}}, "warning: rewards: the code of gsm8k.format has changed after step 3"),
    ],
    ids=["data", "template", "reward"],
)
def test_c63_what_changes_between_a_stop_and_a_resume_is_said_once(tmp_path, capsys, changes, said):
    """Kind: `config.yaml` names something that it does not hold; that changes, and the run goes on without a word."""
    resumed(tmp_path, made_of(**changes))
    assert capsys.readouterr().err.startswith(said)
    inputs.check(tmp_path, CONFIG, 4, made_of(**changes))
    assert capsys.readouterr().err == ""
    (earlier,) = json.loads((tmp_path / "inputs.json").read_text())["earlier"]
    assert earlier == made_of() | {"until_step": 3}


def test_c63_another_model_is_refused_where_there_is_a_reference(tmp_path, capsys):
    """Kind: as above. A hub branch that moved shows by its commit; without a KL it is a warning."""
    now = made_of(model="other", commit="def")
    with pytest.raises(ValueError, match="^model: the weights in 'some/name' .* \\(commit abc then, def now\\)"):
        resumed(tmp_path, now)
    assert json.loads((tmp_path / "inputs.json").read_text())["model"] == "weights"
    resumed(tmp_path, now, config=replace(CONFIG, kl_coef=0.0))
    assert capsys.readouterr().err.startswith("warning: model: the weights in 'some/name' are not those")


def test_c63_nothing_is_compared_before_the_first_step_or_with_an_old_run(tmp_path, capsys):
    """Kind: as above. A run that starts from the beginning is made of what is there now."""
    resumed(tmp_path, made_of(model="other"), step=0)
    (tmp_path / "inputs.json").unlink()
    inputs.check(tmp_path, CONFIG, 5, made_of())
    assert capsys.readouterr().err == ""


def test_c63_every_number_of_the_weights_and_every_prompt_counts():
    """Kind: as above."""
    policy = tiny_policy()
    before = inputs.of_weights(policy)
    assert inputs.of_weights(tiny_policy()) == before
    with torch.no_grad():
        policy.head[5, 3] *= 1.0001
    assert inputs.of_weights(policy) != before
    assert inputs.of_weights(tiny_policy(precision="fp64")) != before
    assert inputs.of_model(policy) == {"model": inputs.of_weights(policy), "commit": None}
    first = inputs.look(CONFIG, {}, PROBLEMS, [[1, 2], [3]])
    assert first["prompts"] != inputs.look(CONFIG, {}, PROBLEMS, [[1], [2, 3]])["prompts"]
    assert first["data"] != inputs.look(CONFIG, {}, PROBLEMS[::-1], [])["data"]


def test_c63_the_code_of_a_reward_is_its_file_and_those_that_it_uses(tmp_path, monkeypatch):
    """Kind: as above. A helper in another file decides what a reward pays, too."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_a_user.py").write_text("import re\nimport helper_of_a_user\n")
    helper = tmp_path / "helper_of_a_user.py"
    helper.write_text("value = 1")
    try:
        before = inputs.of_code("of_a_user")
        assert inputs.of_code("of_a_user") == before
        helper.write_text("value = 2")
        assert inputs.of_code("of_a_user") != before
    finally:
        for name in ("of_a_user", "helper_of_a_user"):
            assert isinstance(sys.modules.pop(name), ModuleType)
    assert inputs.of_code("rewards.gsm8k") != inputs.of_code("rewards.gsm8k_published")


def test_c63_the_code_of_a_reward_outside_counts_wherever_its_file_lies(tmp_path):
    """Kind: as above. The file may have been moved, with what is in it."""
    digests = []
    for place, code in (("a", "return 1.0"), ("b", "return 1.0"), ("c", "return 2.0")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "own.py").write_text(f"def one(completion, problem):\n    {code}\n")
        config = replace(CONFIG, rewards=(f"{tmp_path}/{place}/own.py:one",))
        digests.append(inputs.look(config, {}, PROBLEMS, [])["rewards"])
    assert digests[0] == digests[1] != digests[2] and list(digests[2]) == ["own.one"]


def _other_weights(out) -> None:
    distributed.init("cpu", 60)
    policy = tiny_policy(seed=distributed.rank())
    try:
        inputs.of_weights(policy)
    except ValueError as error:
        out.with_name(f"said_{distributed.rank()}").write_text(str(error))
    distributed.shutdown()


def test_c63_hosts_with_other_weights_under_the_same_name_are_refused(tmp_path):
    """Kind: as above: each rank would compute the KL to a reference of its own."""
    ranks = runs.start_ranks(partial(_other_weights, tmp_path / "x"), 2, tmp_path / "out")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    said = {(tmp_path / f"said_{rank}").read_text() for rank in (0, 1)}
    assert said == {"model: rank 1 has loaded other weights than rank 0; hosts must have the same files"}
