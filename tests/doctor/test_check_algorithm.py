"""Each check of an option speaks when it should, with its level, and is silent beside the border."""

from dataclasses import replace

import pytest

from grpo.doctor.check_algorithm import ALGORITHM_CHECKS
from tests.fakes.known_facts import SIZES, config, facts

GSPO = {"loss": "gspo", "weighting": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4}


def found(facts_=None, **changes) -> list[tuple[str, str]]:
    """(level, what) of all findings about the known good recipe with these changes."""
    looked_at = facts_ or facts()
    all_found = [finding for check in ALGORITHM_CHECKS for finding in check(config(**changes), looked_at)]
    assert all(finding.means and finding.do for finding in all_found)
    return [(finding.level, finding.what) for finding in all_found]


def test_a_good_recipe_has_no_finding():
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"group_size": 1}, "sure", "group_size is 1"),
        ({"loss": "reinforce"}, "warning", "loss reinforce makes 2 updates"),
        ({"loss": "gspo", "weighting": "sequence_mean"}, "warning", "bounds of 0.2 and 0.2 never clips"),
        ({"loss": "gspo_token", "weighting": "sequence_mean"}, "warning", "loss gspo_token with bounds of 0.2 and 0.2"),
        ({"loss": "gmpo"}, "warning", "gmpo with weighting token_mean"),
        ({"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}, "warning", "gspo with weighting token_mean"),
        ({"loss": "cispo", "weighting": "sequence_mean", "clip_low": 1.0}, "warning", "cispo with weighting sequence"),
        ({"advantage": "dr_grpo", "weighting": "sequence_mean"}, "note", "dr_grpo with weighting sequence_mean"),
        ({"learning_rate": 0.0}, "sure", "learning_rate is 0"),
        ({"learning_rate": 1e-4}, "sure", "learning_rate 0.0001 for 500 million parameters"),
        ({"learning_rate": 1e-5}, "warning", "learning_rate 1e-05 for 500 million parameters"),
        ({"lora_rank": 16, "learning_rate": 3e-4}, "warning", "learning_rate 0.0003 with lora_rank 16"),
        ({"lora_rank": 16, "learning_rate": 1e-6}, "note", "learning_rate 1e-06 with lora_rank 16"),
        ({"lora_rank": 200, "learning_rate": 1e-5}, "warning", "200: adapters of 90,000,000 weights beside the 350,"),
        ({"num_steps": 4}, "note", "8 updates of 1e-06 move a weight by about 8e-06"),
        ({"warmup_steps": 200}, "warning", "warmup_steps (200) is not below num_steps (200)"),
        ({"kl_coef": 0.1, "kl": "k1"}, "warning", "kl k1 with kl_coef 0.1"),
        (
            {"ratio_to": "sampler", "sampler_correction": "mask"},
            "warning",
            "sampler_correction mask with ratio_to sampler",
        ),
        ({"shard": "full"}, "note", "shard full with a single process"),
        ({"lag": 1}, "note", "lag 1 with ratio_to learner and sampler_correction none"),
        ({"kl_target": 0.1}, "warning", "kl_target 0.1 with kl_coef 0"),
        ({"reference_sync_every": 5}, "warning", "reference_sync_every 5 with kl_coef 0"),
        ({"kl_stop": 0.1, "num_epochs": 1}, "warning", "kl_stop 0.1 with one update per step"),
        ({"sampler_correction": "mask_row"}, "warning", "mask_row with correction_floor 0.5 and correction_cap 2"),
        ({"sampler_correction": "mask_row", "correction_floor": 0.99}, "warning", "floor 0.99 and correction_cap 2"),
        ({"sampler_correction": "veto"}, "warning", "veto with correction_floor 0.5 and correction_cap 2"),
        ({"sampler_correction": "veto", "correction_floor": 1e-4}, "warning", "veto with correction_floor 0.0001"),
        ({"flat_groups": "drop", "advantage": "batch_std"}, "note", "flat_groups drop with advantage batch_std"),
        ({"flat_groups": "refill", "whiten": True}, "note", "flat_groups refill with whiten"),
        ({"flat_groups": "drop", "advantage": "reinforce_pp_baseline"}, "note", "drop with advantage reinforce_pp"),
        ({"entropy_share": 0.2, **GSPO, "loss": "gmpo"}, "warning", "entropy_share 0.2 with loss gmpo"),
        ({"entropy_share": 0.2, **GSPO}, "warning", "entropy_share 0.2 with loss gspo"),
        ({"curriculum": "pass_rate"}, "note", "curriculum pass_rate draws 6,400 times from 7,000 problems"),
        ({"reward_weights": (0.0, 0.0)}, "sure", "every reward_weight is 0"),
        ({"reward_weights": (-1.0, 1.0)}, "warning", "gsm8k.format has weight -1"),
        ({"rewards": ("code.passed",), "reward_weights": (1.0,)}, "warning", "code.passed has weight 1"),
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
        GSPO,
        {"loss": "gspo", "weighting": "sequence_mean", "num_epochs": 1},
        {"kl_target": 0.1, "kl_coef": 0.1, "reference_sync_every": 5},
        {"kl_stop": 0.1},
        {"kl_stop": 0.1, "num_epochs": 1, "minibatch_size": 128},
        {"sampler_correction": "mask_row", "correction_floor": 0.9, "correction_cap": 1.1},
        {"sampler_correction": "veto", "correction_floor": 0.01, "correction_cap": 100.0},
        {"sampler_correction": "mask"},
        {"flat_groups": "drop"},
        {"advantage": "batch_std", "whiten": True},
        {"entropy_share": 0.2},
        {"entropy_share": 0.2, **GSPO, "loss": "gspo_token"},
        {"curriculum": "pass_rate", "num_steps": 219},
        {"loss": "reinforce", "num_epochs": 1},
        {"loss": "cispo"},
        {"learning_rate": 9e-6},
        {"warmup_steps": 199},
        {"temperature": 0.7},
        {"kl": "k1"},
        {"ratio_to": "sampler", "sampler_correction": "opsm"},
        {"lag": 1, "ratio_to": "sampler"},
        {"lag": 1, "sampler_correction": "truncate"},
        {"reward_weights": (0.0, 1.0)},
        {"advantage": "dr_grpo", "weighting": "constant_length"},
        {"kl_coef": 0.1, "kl": "k1", "kl_in": "reward"},
    ],
)
def test_beside_the_border_is_silence(changes):
    assert found(**changes) == []


def test_a_rate_that_is_too_high_for_a_real_model_suits_a_small_one():
    assert found(facts_=facts(sizes=replace(SIZES, parameters=1_000_000)), learning_rate=2e-4) == []


def test_processes_and_prompts():
    assert found(facts_=facts(world_size=32)) == []
    assert found(facts_=facts(world_size=64)) == [("warning", "32 prompts on 64 processes")]
