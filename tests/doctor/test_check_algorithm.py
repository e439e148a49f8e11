"""Each check of an option speaks when it should, with its level, and is silent beside the border."""

import pytest

from grpo.doctor.check_algorithm import ALGORITHM_CHECKS
from tests.fakes.known_facts import SIZES, config, facts


def found(levels: str = "sure warning note", facts_=None, **changes) -> list[tuple[str, str]]:
    """(level, what) of all findings about the known good recipe with these changes."""
    looked_at = facts_ or facts()
    all_found = [finding for check in ALGORITHM_CHECKS for finding in check(config(**changes), looked_at)]
    assert all(finding.means and finding.do for finding in all_found)
    return [(finding.level, finding.what) for finding in all_found if finding.level in levels.split()]


def small(**changes):
    """Facts about a model of a million parameters."""
    return facts(sizes=type(SIZES)(**(vars(SIZES) | {"parameters": 1_000_000})), **changes)


def test_a_good_recipe_has_no_finding():
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"group_size": 1}, "sure", "group_size is 1"),
        ({"group_size": 2}, "note", "group_size is 2"),
        ({"num_epochs": 1}, "note", "clip_low and clip_high never act"),
        ({"num_epochs": 1, "loss": "cispo"}, "note", "clip_low and clip_high never act"),
        ({"loss": "reinforce"}, "warning", "loss reinforce makes 2 updates"),
        ({"loss": "gspo", "weighting": "sequence_mean"}, "warning", "bounds of 0.2 and 0.2 never clips"),
        ({"loss": "gspo_token", "weighting": "sequence_mean"}, "warning", "loss gspo_token with bounds of 0.2 and 0.2"),
        ({"clip_high": 0.0}, "warning", "clip_high 0"),
        ({"loss": "gmpo"}, "warning", "gmpo with weighting token_mean"),
        ({"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}, "warning", "gspo with weighting token_mean"),
        ({"loss": "cispo", "weighting": "sequence_mean", "clip_low": 1.0}, "warning", "cispo with weighting sequence"),
        ({"loss": "cispo"}, "note", "cispo with a lower bound"),
        ({"advantage": "dr_grpo", "weighting": "sequence_mean"}, "note", "dr_grpo with weighting sequence_mean"),
        ({"learning_rate": 0.0}, "sure", "learning_rate is 0"),
        ({"learning_rate": 1e-4}, "sure", "learning_rate 0.0001 for 500 million parameters"),
        ({"learning_rate": 1e-5}, "warning", "learning_rate 1e-05 for 500 million parameters"),
        ({"num_steps": 4}, "note", "8 updates of 1e-06 move a weight by about 8e-06"),
        ({"warmup_steps": 200}, "warning", "warmup_steps (200) is not below num_steps (200)"),
        ({"kl_coef": 0.1, "kl": "k1"}, "warning", "kl k1 with kl_coef 0.1"),
        ({"kl_coef": 0.1, "kl": "k1", "kl_in": "reward"}, "note", "kl_coef 0.1 does nothing in the first update"),
        ({"kl_coef": 0.1}, "note", "kl_coef 0.1 does nothing in the first update"),
        ({"prompts_per_step": 8000}, "warning", "prompts_per_step (8000) is more than the 7000"),
        ({"num_steps": 5000}, "note", "every training problem is drawn 23 times"),
        ({"minibatch_size": 256}, "note", "minibatch_size (256) is the whole step (256"),
        ({"minibatch_size": 96}, "note", "minibatch_size (96) does not divide the 256"),
        ({"reward_weights": (0.0, 0.0)}, "sure", "every reward_weight is 0"),
        ({"reward_weights": (0.0, 1.0)}, "note", "gsm8k.format has weight 0"),
        ({"reward_weights": (-1.0, 1.0)}, "warning", "gsm8k.format has weight -1"),
        ({"temperature": 0.2}, "warning", "temperature 0.2"),
        ({"temperature": 2.0}, "warning", "temperature 2"),
    ],
)
def test_one_change_one_finding(changes, level, said):
    findings = found(**changes)
    assert len(findings) == 1, findings
    assert findings[0][0] == level and said in findings[0][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": 4},
        {"loss": "gspo", "weighting": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
        {"loss": "cispo", "clip_low": 1.0},
        {"learning_rate": 9e-6},
        {"warmup_steps": 199},
        {"minibatch_size": 64},
        {"temperature": 0.7},
        {"advantage": "dr_grpo", "weighting": "constant_length"},
    ],
)
def test_beside_the_border_is_silence(changes):
    assert found(**changes) == []


def test_a_rate_that_is_too_high_for_a_real_model_suits_a_small_one():
    assert found(facts_=small(), learning_rate=2e-4) == []


def test_a_run_of_one_update_needs_no_reference():
    findings = found("warning", num_steps=1, num_epochs=1, kl_coef=0.1)
    assert findings == [("warning", "kl_coef 0.1 in a run of one update")]


def test_processes_and_prompts():
    assert found(facts_=facts(world_size=8)) == []
    assert found(facts_=facts(world_size=5)) == [("note", "32 prompts on 5 processes")]
    assert found(facts_=facts(world_size=64)) == [("warning", "32 prompts on 64 processes")]
