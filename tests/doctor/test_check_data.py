"""Each check of data, evaluations and memory speaks when it should, and is silent beside the border."""

from dataclasses import replace

import pytest

from grpo.doctor.check_data import DATA_CHECKS, fits
from tests.fakes.known_facts import EVALUATION, SIZES, config, facts


def found(facts_=None, **changes) -> list[tuple[str, str]]:
    """(level, what) of all findings about the known good recipe with these changes."""
    looked_at = facts_ or facts()
    all_found = [finding for check in DATA_CHECKS for finding in check(config(**changes), looked_at)]
    assert all(finding.means and finding.do for finding in all_found)
    return [(finding.level, finding.what) for finding in all_found]


def judged_by(**changes) -> tuple:
    return (replace(EVALUATION, **changes),)


def test_a_good_recipe_has_no_finding():
    assert found() == []


@pytest.mark.parametrize(
    ("known", "changes", "level", "said"),
    [
        ({}, {"max_prompt_tokens": 889}, "sure", "10 of 100 training prompts exceed max_prompt_tokens (889)"),
        ({"evaluations": judged_by(longest_prompt=4097)}, {}, "sure", "test prompts with 8 shots have up to 4097"),
        ({"sizes": replace(SIZES, context=1255)}, {}, "warning", "reach 1256 tokens, the model was made for 1255"),
        ({"sizes": replace(SIZES, context=99, ends=True)}, {}, "sure", "reach 1256 tokens, the model was"),
        ({}, {"max_new_tokens": 140}, "warning", "10% of the data's own solutions do not fit"),
        ({}, {"max_new_tokens": 50}, "sure", "100% of the data's own solutions do not fit"),
        ({"evaluations": judged_by(also_trained=("Why?",))}, {}, "warning", "1 of 1319 test questions are training"),
        ({"evaluations": judged_by(also_trained=("Why?",) * 14)}, {}, "sure", "14 of 1319 test questions are training"),
        ({}, {"eval_shots": (0, 4)}, "warning", "trained with 8 shots and evaluated with 0, 4"),
        ({"device_bytes": 8 * 10**9}, {}, "sure", "GB are needed, 9.6 GB of them for weights and optimiser"),
    ],
)
def test_one_change_one_finding(known, changes, level, said):
    findings = found(facts(**known), **changes)
    assert len(findings) == 1, findings
    assert findings[0][0] == level and said in findings[0][1]


@pytest.mark.parametrize(
    ("known", "changes"),
    [
        ({}, {"max_prompt_tokens": 899}),
        ({"evaluations": judged_by(longest_prompt=4096)}, {}),
        ({"sizes": replace(SIZES, context=1256)}, {}),
        ({}, {"max_new_tokens": 147}),
        ({"solution_tokens": ()}, {"max_new_tokens": 8}),
        ({"evaluations": ()}, {}),
        ({}, {"eval_shots": (0, 8)}),
    ],
)
def test_beside_the_border_is_silence(known, changes):
    assert found(facts(**known), **changes) == []


def test_memory_that_only_the_estimate_exceeds_is_a_warning():
    findings = found(facts(device_bytes=int(9.8e9)))
    assert [level for level, _ in findings] == ["warning"]


def test_where_a_whole_model_does_not_fit_shards_are_advised():
    small, many = facts(device_bytes=8 * 10**9), facts(device_bytes=8 * 10**9, world_size=8, nearby=8)
    advice = [next(fits(config(), known)).do for known in (small, many)]
    assert "shard" not in advice[0] and advice[1].startswith("shard full, with which about ")
