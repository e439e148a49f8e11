"""Each check of data, graders, evaluations and memory speaks when it should, and is silent beside the border."""

from dataclasses import replace

import pytest

from grpo.doctor.check_data import DATA_CHECKS
from grpo.doctor.probes import Disagreement, RewardProbe
from tests.fakes.known_facts import EVALUATION, SIZES, config, facts


def found(facts_=None, **changes) -> list[tuple[str, str]]:
    """(level, what) of all findings about the known good recipe with these changes."""
    looked_at = facts_ or facts()
    all_found = [finding for check in DATA_CHECKS for finding in check(config(**changes), looked_at)]
    assert all(finding.means and finding.do for finding in all_found)
    return [(finding.level, finding.what) for finding in all_found]


def judged_by(**changes) -> tuple:
    return (replace(EVALUATION, **changes),)


def graders(*golds: str, of: int = 100, name: str = "gsm8k.correctness", reads: bool = True):
    return (RewardProbe(name, of, golds, reads),)


APART = Disagreement("gsm8k_published.correctness", "two answer lines", 7, 9, "#### 1\n#### 2", "2", earned=False)


def test_a_good_recipe_has_no_finding():
    assert found() == []


@pytest.mark.parametrize(
    ("known", "changes", "level", "said"),
    [
        ({"errors": ("loss is 'gppo'",)}, {}, "sure", "loss is 'gppo'"),
        ({}, {"max_prompt_tokens": 889}, "sure", "10 of 100 training prompts exceed max_prompt_tokens (889)"),
        ({"left_out": 3}, {"skip_long_prompts": True}, "note", "leaves out 3 of 103 training prompts"),
        ({"evaluations": judged_by(longest_prompt=4097)}, {}, "sure", "test prompts with 8 shots have up to 4097"),
        ({"sizes": replace(SIZES, context=1255)}, {}, "warning", "reach 1256 tokens, the model was made for 1255"),
        ({}, {"max_new_tokens": 140}, "warning", "10% of the data's own solutions do not fit"),
        ({}, {"max_new_tokens": 50}, "sure", "100% of the data's own solutions do not fit"),
        ({}, {"mask_truncated": True}, "note", "mask_truncated leaves cut completions out"),
        ({"stop": ()}, {}, "warning", "without a stop string"),
        ({"has_chat_template": True}, {}, "note", "has a chat template"),
        (
            {"graders": (RewardProbe("a.b", 3, ("1",) * 3, False, "KeyError: 'x'"),)},
            {},
            "sure",
            "a.b fails on every text it",
        ),
        ({"graders": graders("1,080")}, {}, "warning", "nothing to 1.00% of the gold answers (1 of 100: '1,080')"),
        ({"graders": graders(*["1,080"] * 30)}, {}, "sure", "30.00%"),
        ({"graders": graders(*["7"] * 100, reads=False, name="length.penalty")}, {}, "note", "100.00%"),
        ({"disagreements": (APART,)}, {}, "warning", "does not pay for what gsm8k.correctness counts as right: two"),
        ({"disagreements": (replace(APART, earned=True),)}, {}, "warning", "pays for what gsm8k.correctness counts"),
        ({"evaluations": judged_by(also_trained=("Why?",))}, {}, "warning", "1 of 1319 test questions are training"),
        ({"evaluations": judged_by(also_trained=("Why?",) * 14)}, {}, "sure", "14 of 1319 test questions are training"),
        ({"evaluations": judged_by(also_shown=("Why?",))}, {}, "sure", "1 of 1319 test questions are exemplars"),
        ({"also_shown": ("Why?",)}, {}, "sure", "1 of 7000 training questions are exemplars"),
        ({}, {"eval_every": 201}, "warning", "eval_every (201) is more than num_steps (200)"),
        ({}, {"eval_shots": (0, 4)}, "warning", "trained with 8 shots and evaluated with 0, 4"),
        ({"evaluations": judged_by(n=100)}, {}, "note", "an evaluation has 100 problems"),
        ({"device_bytes": 8 * 10**9}, {}, "sure", "GB are needed, 9.6 GB of them for weights and optimiser"),
    ],
)
def test_one_change_one_finding(known, changes, level, said):
    findings = found(facts(**known), **changes)
    assert len(findings) == 1, findings
    assert findings[0][0] == level and said in findings[0][1]


def test_c66_a_reward_whose_form_is_unknown_is_no_warning_at_the_start():
    """Kind: a check takes one form of answer for the only one."""
    unknown = facts(graders=graders(*["7"] * 100, reads=False, name="json_task.correct"))
    assert [level for level, _ in found(unknown)] == ["note"]


@pytest.mark.parametrize(
    ("known", "changes"),
    [
        ({}, {"max_prompt_tokens": 899}),
        ({"evaluations": judged_by(longest_prompt=4096)}, {}),
        ({"sizes": replace(SIZES, context=1256)}, {}),
        ({}, {"max_new_tokens": 147}),
        ({"solution_tokens": ()}, {"max_new_tokens": 8}),
        ({"stop": ()}, {"chat": True}),
        ({"has_chat_template": True}, {"chat": True}),
        ({"evaluations": ()}, {}),
        ({}, {"eval_shots": (0, 8)}),
        ({}, {"eval_every": 200}),
    ],
)
def test_beside_the_border_is_silence(known, changes):
    assert found(facts(**known), **changes) == []


def test_the_interval_of_a_small_evaluation_is_said():
    (finding,) = [f for check in DATA_CHECKS for f in check(config(), facts(evaluations=judged_by(n=100)))]
    assert "+-10 points" in finding.means


def test_memory_that_only_the_estimate_exceeds_is_a_warning():
    findings = found(facts(device_bytes=int(9.8e9)))
    assert [level for level, _ in findings] == ["warning"]
