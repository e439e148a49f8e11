"""One step's experience: who is asked, what is completed, what it earns, and what is learned from."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from data.problem import Problem
from grpo.advantages import ADVANTAGES, combine
from grpo.config import Config
from grpo.dataloader import encode_prompts, render, stop_strings
from grpo.metrics import Sums
from grpo.policy import Policy
from grpo.prompts.order import draw_prompts
from grpo.record import measure, write_transcripts
from grpo.rollout import Collector, Rollout
from grpo.sampler import Sampler
from grpo.tree import trunk_length
from rewards.runner import RewardRunner
from tests.fakes import runs
from tests.fakes.models import byte_tokenizer

SHOT = {"question": "1+1?", "solution": "1 + 1 = 2.", "answer": "2"}
PROBLEM = Problem("the whole prompt", "5", {"question": "2+3?", "shots": [SHOT], "stop": ["\n\nQ", "#"]})
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_prompt_is_the_problem_s_own_text():
    assert render(PROBLEM, byte_tokenizer(), chat=False) == "the whole prompt"


def test_chat_renders_exemplars_as_turns_and_asks_for_an_answer():
    asked = "<user>1+1?<assistant>1 + 1 = 2.\n#### The final answer is 2<user>2+3?<assistant>"
    assert render(PROBLEM, chat_tokenizer(), chat=True) == asked
    bare = Problem("no question known", "5", {})
    assert render(bare, chat_tokenizer(), chat=True) == "<user>no question known<assistant>"


class AddsBos:
    """A tokenizer that marks whether it was asked to add special tokens."""

    chat_template = TEMPLATE

    def __init__(self):
        self.inner = chat_tokenizer()
        self.apply_chat_template = self.inner.apply_chat_template

    def __call__(self, texts, add_special_tokens):
        encoded = self.inner(texts)
        encoded["input_ids"] = [[256] * add_special_tokens + row for row in encoded["input_ids"]]
        return encoded


def test_special_tokens_are_added_unless_the_template_wrote_them():
    (plain,) = encode_prompts([PROBLEM], AddsBos(), chat=False, max_prompt_tokens=99)
    (chat,) = encode_prompts([PROBLEM], AddsBos(), chat=True, max_prompt_tokens=99)
    assert plain[0] == 256 and byte_tokenizer().decode(plain[1:]) == "the whole prompt"
    assert 256 not in chat and byte_tokenizer().decode(chat).startswith("<user>1+1?")


def test_prompts_that_are_too_long_are_an_error_that_says_how_many_and_how_long():
    lengths = [3, 11, 10, 12]
    problems = [Problem("x" * length, "1", {}) for length in lengths]
    encoded = encode_prompts(problems, byte_tokenizer(), chat=False, max_prompt_tokens=12)
    assert [len(ids) for ids in encoded] == lengths
    with pytest.raises(ValueError, match="max_prompt_tokens: 2 of 4 prompts are longer than 10 tokens, the longest 12"):
        encode_prompts(problems, byte_tokenizer(), chat=False, max_prompt_tokens=10)


def test_an_empty_prompt_and_a_missing_template_are_errors():
    with pytest.raises(ValueError, match="1 of 2 prompts have no token"):
        encode_prompts([Problem("x", "1", {}), Problem("", "1", {})], byte_tokenizer(), chat=False, max_prompt_tokens=9)
    with pytest.raises(ValueError, match="chat: True needs a tokenizer with a chat template"):
        encode_prompts([PROBLEM], byte_tokenizer(), chat=True, max_prompt_tokens=99)


def test_every_prompt_is_encoded_where_there_are_many():
    problems = [Problem(f"{i}+1=", "1", {}) for i in range(2500)]
    encoded = encode_prompts(problems, byte_tokenizer(), chat=False, max_prompt_tokens=9)
    assert [byte_tokenizer().decode(ids) for ids in encoded[::499]] == [f"{i}+1=" for i in range(0, 2500, 499)]
    assert len(encoded) == 2500


def test_stop_strings_come_with_the_problems():
    assert stop_strings([PROBLEM, Problem("x", "1", {"stop": ["#", "\n\nQ"]})]) == ["\n\nQ", "#"]
    assert stop_strings([Problem("x", "1", {})]) == stop_strings([]) == []
    block = Problem("x", "1", {"stop": ["END"], "stop_plain": ["```"]})
    assert (stop_strings([block]), stop_strings([block], chat=True)) == (["```"], ["END"])
    with pytest.raises(ValueError, match=r"different stop strings \(\[\] and \['\\n\\nQ', '#'\]\)"):
        stop_strings([PROBLEM, Problem("y", "1", {})])


class Runner:
    """Rewards as told: `values[k][b]`, or a function of the text and its problem."""

    def __init__(self, *terms):
        self.terms = terms

    def score(self, completions, problems, told):
        self.told = told
        assert len(completions) == len(problems)
        pairs = list(zip(completions, problems, strict=True))
        return [[term(*pair) for pair in pairs] if callable(term) else list(term) for term in self.terms]


PROBLEMS = [Problem(f"{i}+{i}=", str(i % 4), {"question": f"q{i}", "stop": ["##"]}) for i in range(5)]


def sampler() -> Sampler:
    return Sampler(Policy(runs.digit_model(), runs.digit_tokenizer()), runs.digit_tokenizer())


def collector(runner, **changes) -> Collector:
    sizes = {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 12, "rewards": ("a", "b")}
    return Collector(Config(**sizes | {"reward_weights": (2.0, 0.5)} | changes), PROBLEMS, sampler(), runner)


def measured(rollout) -> dict:
    sums = Sums()
    measure(rollout, ("a", "b"), sums)
    return sums.reduce()


def test_c11_completions_are_drawn_at_the_temperature_that_is_learned_at(monkeypatch):
    made = collector(None, temperature=0.7)
    generate, asked = made.sampler.generate, []
    monkeypatch.setattr(made.sampler, "generate", lambda *a, **k: asked.append(k["temperature"]) or generate(*a, **k))
    made.sample(1)
    assert asked == [0.7]


def test_a_chat_is_what_is_completed():
    made = sampler()
    made.tokenizer = chat_tokenizer()
    sizes = {"prompts_per_step": 1, "group_size": 2, "max_new_tokens": 2, "rewards": ("a",), "reward_weights": (1.0,)}
    shown = Collector(Config(**sizes, chat=True), PROBLEMS, made, None).prompt_ids
    texts = [render(problem, made.tokenizer, True) for problem in PROBLEMS]
    assert [ids.tolist() for ids in shown] == [made.tokenizer(text).input_ids for text in texts]
    assert len(shown[0]) > len(made.tokenizer(PROBLEMS[0].prompt).input_ids)


@pytest.mark.parametrize("chat", [False, True])
def test_c68_one_prompt_that_is_too_long_or_empty_is_left_out_of_training_if_asked(capsys, chat):
    """The kind: one problem in thousands ends a run before its first step, and the file has to be edited.

    Siblings: prompts without a token; exemplars that make all too long; the doctor and its estimates
    (tests/doctor/test_facts.py). An evaluation leaves no problem out: what it measures would change in silence.
    """
    texts = ["1+1=", "2+2=" * 30, "3+3="] + ([] if chat else [""])
    problems = [Problem(text, "1", {}) for text in texts]
    made = sampler()
    if chat:
        made.tokenizer = chat_tokenizer()
    limit = len(render(problems[0], made.tokenizer, chat))
    sizes = {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 2, "rewards": ("a",), "reward_weights": (1.0,)}
    config = Config(**sizes, chat=chat, max_prompt_tokens=limit)
    with pytest.raises(ValueError, match="or leave them out of training with --skip_long_prompts True"):
        Collector(config, problems, made, None)
    with pytest.raises(ValueError, match="the longest .* fewer shots; or leave them out of training with"):
        Collector(config, problems[:3], made, None)
    capsys.readouterr()
    kept = Collector(replace(config, skip_long_prompts=True), problems, made, None)
    assert [problem.prompt for problem in kept.problems] == ["1+1=", "3+3="]
    assert [len(ids) for ids in kept.prompt_ids] == [limit, limit]
    said = f"skip_long_prompts: {len(texts) - 2} of {len(texts)} training prompts are left out"
    assert capsys.readouterr().err == f"{said} (no token, or more than max_prompt_tokens, {limit})\n"
    if not chat:
        drawn = kept.sample(1)
        assert {problem.prompt for problem in drawn.problems} == {"1+1=", "3+3="}
    with pytest.raises(ValueError, match="max_prompt_tokens: none of the 1 training prompts .* leaves none"):
        Collector(replace(config, skip_long_prompts=True), problems[1:2], made, None)


def test_c68_nothing_is_said_where_nothing_is_left_out(capsys):
    kept = collector(None, skip_long_prompts=True)
    assert kept.problems == PROBLEMS and capsys.readouterr().err == ""


def test_what_all_prompts_of_the_run_begin_with_is_the_trunk_of_every_step(monkeypatch):
    """And not what the prompts of one step happen to share: one alone would be a trunk of its own."""
    asked, made = [], collector(None, prompts_per_step=1)
    generate = made.sampler.generate
    monkeypatch.setattr(made.sampler, "generate", lambda *a, **k: asked.append(k["trunk_tokens"]) or generate(*a, **k))
    made.sample(1), made.sample(2)
    assert asked == [trunk_length(made.prompt_ids)] * 2 == [len(made.trunk_ids)] * 2


A = [1, 0, 0, 1] + [0, 0, 0, 0] + [1, 0, 0, 0]
B = [0, 0, 4, 2] + [2, 2, 2, 2] + [0, 2, 0, 2]
TOTAL = [[2, 0, 2, 3], [1, 1, 1, 1], [2, 1, 0, 1]]  # 2 A + 0.5 B


def test_c10_the_logged_reward_is_the_optimised_one_and_each_term_is_logged_too():
    rollout = collector(Runner(A, B), advantage="dr_grpo").reward(collector(None).sample(1))
    assert rollout.rewards.tolist() == TOTAL
    assert rollout.advantages.tolist()[0] == [0.25, -1.75, 0.25, 1.25]  # minus the mean 1.75
    assert rollout.batch.advantages.tolist() == rollout.advantages.flatten().tolist()
    metrics = measured(rollout)
    assert metrics["reward/mean"] == pytest.approx(sum(map(sum, TOTAL)) / 12)
    assert (metrics["reward/a"], metrics["reward/b"]) == pytest.approx((3 / 12, 18 / 12))
    assert metrics["reward/flat_groups"] == pytest.approx(1 / 3)
    assert metrics["reward/invalid"] == 0


def test_rewards_are_told_how_each_completion_was_sampled():
    runner = Runner(A, B)
    made = collector(runner)
    completions = made.reward(made.sample(1)).completions
    ids, mask = completions.completion_ids, completions.completion_mask
    assert runner.told["tokens"] == [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert runner.told["length"] == [len(row) for row in runner.told["tokens"]] and len(set(runner.told["length"])) > 1
    assert runner.told["finished"] == completions.finished.tolist() and runner.told["cap"] == [12] * 12


def test_combine_advantages_normalises_each_term_first():
    rollout = collector(Runner(A, B), combine="advantages").reward(collector(None).sample(1))
    terms = torch.tensor([A, B], dtype=torch.float32).view(2, 3, 4)
    expected = 2 * ADVANTAGES["grpo"](terms[0]) + 0.5 * ADVANTAGES["grpo"](terms[1])
    torch.testing.assert_close(rollout.advantages, expected)
    assert not torch.allclose(rollout.advantages, combine(terms, (2.0, 0.5), ADVANTAGES["grpo"], "rewards"))
    assert rollout.rewards.tolist() == TOTAL


def test_a_reward_that_does_not_apply_adds_nothing_and_is_no_failure():
    """Term a has nothing to say of samples 1 and 2 of prompt 0; of prompt 1 none of the two has, but for sample 0."""
    a, b = list(A), list(B)
    a[1] = a[2] = -math.inf
    a[5:8] = b[5:8] = [-math.inf] * 3
    rollout = collector(Runner(a, b), advantage="dr_grpo").reward(collector(None).sample(1))
    assert rollout.valid.tolist() == [[True] * 4, [True, False, False, False], [True] * 4]
    total = [2 * a[0] + b[0] / 2, b[1] / 2, b[2] / 2, 2 * a[3] + b[3] / 2]
    assert rollout.rewards[0].tolist() == total
    assert rollout.advantages[0].tolist() == [value - sum(total) / 4 for value in total]
    metrics = measured(rollout)
    assert metrics["reward/invalid"] == pytest.approx(3 / 12)
    assert metrics["reward/a"] == pytest.approx((A[0] + A[3] + A[4] + sum(A[8:])) / 7)
    b[1] = None  # a failure is a failure, whatever the other says
    rollout = collector(Runner(a, b)).reward(collector(None).sample(1))
    assert rollout.valid[0].tolist() == [True, False, True, True]


def test_a_reward_that_is_too_low_for_the_dtype_is_not_taken_for_one_that_does_not_apply():
    rollout = collector(Runner([-1e39, 1, 0, 0] + A[4:], B)).reward(collector(None).sample(1))
    assert rollout.valid.tolist() == [[False, True, True, True], [True] * 4, [True] * 4]


def test_combined_as_advantages_a_term_has_a_baseline_of_the_samples_it_applies_to():
    a, b = list(A), list(B)
    a[1] = -math.inf
    rollout = collector(Runner(a, b), combine="advantages", advantage="dr_grpo").reward(collector(None).sample(1))
    others = (A[0] + A[2] + A[3]) / 3
    of_a = [A[0] - others, 0, A[2] - others, A[3] - others]
    of_b = [value - sum(B[:4]) / 4 for value in B[:4]]
    expected = [2 * one + 0.5 * other for one, other in zip(of_a, of_b, strict=True)]
    assert rollout.advantages[0].tolist() == pytest.approx(expected)


def test_a_group_is_flat_where_no_advantage_is_left_however_terms_are_combined():
    """Two terms of unlike spread that add up to the same reward: flat as a sum, and not one by one."""
    a, b = [1, 0, 1, 0] + [1] * 8, [0, 4, 0, 4] + [2] * 8
    for how, share in (("rewards", 1), ("advantages", 2 / 3)):
        rollout = collector(Runner(a, b), combine=how).reward(collector(None).sample(1))
        assert measured(rollout)["reward/flat_groups"] == pytest.approx(share)


def test_c35_a_reward_that_is_no_number_in_float32_is_invalid():
    rollout = collector(Runner([1e39, 1, 0, 0] + A[4:], B)).reward(collector(None).sample(1))
    assert rollout.valid.tolist() == [[False, True, True, True], [True] * 4, [True] * 4]
    assert rollout.advantages.isfinite().all() and rollout.advantages[0, 0] == 0
    metrics = measured(rollout)
    assert metrics["reward/invalid"] == pytest.approx(1 / 12)
    assert metrics["reward/a"] == pytest.approx(sum([1, 0, 0] + A[4:]) / 11)


def test_c35_c08_a_failed_reward_is_left_out_of_its_baseline_and_counted():
    """Sample 1 of prompt 0 failed one of its rewards, prompt 2 failed altogether."""
    a, b = list(A), list(B)
    b[1] = None
    a[8:] = [None] * 4
    made = collector(Runner(a, b), advantage="dr_grpo")
    drawn = made.sample(1)
    rollout = made.reward(drawn)
    assert rollout.valid.tolist() == [[True, False, True, True], [True] * 4, [False] * 4]
    around_7_thirds = [-1 / 3, 0, -1 / 3, 2 / 3]
    assert rollout.advantages.flatten().tolist() == pytest.approx(around_7_thirds + [0] * 8)
    mask = rollout.batch.completion_mask
    kept = rollout.valid.flatten()
    assert not mask[~kept].any()
    assert torch.equal(mask[kept], drawn.completions.completion_mask[kept])
    assert rollout.batch.advantages.isfinite().all()
    metrics = measured(rollout)
    assert metrics["reward/invalid"] == pytest.approx(5 / 12)
    assert metrics["reward/mean"] == pytest.approx((2 + 2 + 3 + 4) / 7)
    assert metrics["reward/a"] == pytest.approx(2 / 8) and metrics["reward/b"] == pytest.approx(18 / 11)
    assert metrics["reward/flat_groups"] == pytest.approx(2 / 3)
    lengths = drawn.completions.completion_mask.sum(1).double()
    assert metrics["completion/length"] == pytest.approx(lengths.mean().item())


def group(rollout, i: int) -> dict:
    """All that belongs to a group of four, as plain values and without padding."""
    rows, batch, completions = range(4 * i, 4 * i + 4), rollout.batch, rollout.completions
    of_prompt = {"problem": rollout.problems[i], "prompt": batch.prompt_ids[i], "number": batch.prompt_index[i]}
    of_rewards = {"terms": rollout.reward_terms[:, i].tolist()} | {
        name: getattr(rollout, name)[i].tolist() for name in ("rewards", "valid", "advantages")
    }
    of_rows = {
        "texts": [completions.texts[row] for row in rows],
        "finished": [bool(completions.finished[row]) for row in rows],
        "sampled": [completions.completion_ids[row][completions.completion_mask[row]].tolist() for row in rows],
        "learned": [batch.completion_ids[row][batch.completion_mask[row]].tolist() for row in rows],
        "learned by": [batch.advantages[row].item() for row in rows],
    }
    return of_prompt | of_rewards | of_rows


def test_c08_rollouts_are_selected_by_prompt_and_joined():
    """Groups stay whole, and keep the advantages that they had among all of their samples."""
    made = collector(Runner(A, B), mask_truncated=True)
    one, other = made.reward(made.sample(1)), made.reward(made.sample(2))
    joined = Rollout.join([one.select([2, 0]), other.select([]), other.select([1])])
    assert [group(joined, i) for i in range(3)] == [group(one, 2), group(one, 0), group(other, 1)]
    assert len(joined.problems) == 3 and group(one, 2) != group(other, 2)
    assert measured(joined)["completion/length"] == joined.completions.completion_mask.sum() / 12


def test_flat_groups_are_dropped_and_the_rest_is_as_it_was():
    """Group 1 is flat. What is left keeps its number, so that minibatches find it."""
    made = collector(Runner(A, B), flat_groups="drop", advantage="dr_grpo")
    rollout, sums = made.collect(1), Sums()
    chosen = made.choose(rollout, sums)
    assert [group(chosen, i) for i in range(2)] == [group(rollout, 0), group(rollout, 2)]
    assert chosen.batch.prompt_index == [0, 2] and len(rollout.problems) == 3
    assert sums.reduce() == {"rollout/refills": 0, "rollout/dropped_groups": 1}
    made.config = replace(made.config, flat_groups="keep")
    assert made.choose(rollout, sums) is rollout


def test_a_refill_has_prompts_and_uniforms_of_its_own_and_too_many_groups_are_cut(monkeypatch):
    """Two of three groups are learnable in each draw: after one refill there are four, of which three are kept."""
    made = collector(Runner(A, B), flat_groups="refill")
    phases, generate, asked = [], made.sampler.generate, []
    monkeypatch.setattr(made.sampler, "generate", lambda *a, **k: asked.append(k["prompt_index"]) or generate(*a, **k))

    def clock(phase):
        phases.append(phase)
        return nullcontext()

    rollout, sums = made.collect(1, clock), Sums()
    assert phases == ["rollout", "reward"] * 2
    assert rollout.batch.prompt_index == [0, 1, 2, 3, 4, 5] and asked == [[0, 1, 2], [3, 4, 5]]
    chosen = [*draw_prompts(5, 3, 0, 1), *draw_prompts(5, 3, 0, 1, 1)]
    assert rollout.problems == [PROBLEMS[i] for i in chosen]
    assert made.choose(rollout, sums).batch.prompt_index == [0, 2, 3]
    assert sums.reduce() == {"rollout/refills": 1, "rollout/dropped_groups": 3}


CURRICULUM = {"curriculum": "pass_rate", "eval_correct": "a", "eval_threshold": 1.0, "pool_weights": (0.0, 1.0, 0.0)}


def test_pass_rates_are_those_of_the_problems_that_were_drawn_refills_included():
    """Group 1 of each draw always fails, and one sample of group 0 does: pass rates 0.25, 0 and 0.25."""
    made = collector(Runner([1, 0, 0, None] + [0] * 4 + [1, 0, 0, 0], B), flat_groups="refill", **CURRICULUM)
    known = {0: 1.0, 3: 0.0}
    rollout, sums = made.collect(1, pass_rates=known), Sums()
    drawn = made.draw(1, 0, known) + made.draw(1, 1, known)
    assert rollout.problems == [PROBLEMS[i] for i in drawn]
    assert set(drawn[:3]) == {1, 2, 4} and set(drawn[3:5]) == {0, 3}  # those of weight 0 come last
    after = made.pass_rates(rollout, 1, known, sums)
    assert after == known | dict(zip(drawn, [1 / 3, 0, 0.25] * 2, strict=True)) and known == {0: 1.0, 3: 0.0}
    assert sums.reduce()["rollout/hard_problems"] == sum(rate <= 0.25 for rate in after.values()) / 5


def test_without_a_curriculum_there_are_no_pass_rates():
    made = collector(Runner(A, B))
    rollout, sums = made.collect(1), Sums()
    assert made.pass_rates(rollout, 1, {}, sums) == {} and not sums.reduce()
    assert rollout.problems == [PROBLEMS[i] for i in draw_prompts(5, 3, 0, 1)]


def test_refills_end_at_their_number():
    made = collector(Runner([0] * 12, [0] * 12), flat_groups="refill", max_refills=2)
    rollout, sums = made.collect(1), Sums()
    chosen = made.choose(rollout, sums)
    assert len(rollout.problems) == 9 and chosen.problems == [] and len(chosen.batch.completion_ids) == 0
    assert sums.reduce() == {"rollout/refills": 2, "rollout/dropped_groups": 9}


def test_what_is_filled_in_before_the_rewards_is_learned_from():
    made = collector(Runner(A, B))
    drawn = made.sample(1)
    assert drawn.batch.advantages is None
    drawn.batch.ref_logprobs = drawn.completions.sampling_logprobs - 1
    assert made.reward(drawn).batch.ref_logprobs is drawn.batch.ref_logprobs


def test_rewards_have_the_dtype_of_the_log_probabilities():
    made = collector(Runner([0.1] * 12, B))
    drawn = made.sample(1)
    drawn.completions.sampling_logprobs = drawn.completions.sampling_logprobs.double()
    rollout = made.reward(drawn)
    for values in (rollout.reward_terms, rollout.rewards, rollout.advantages, rollout.batch.advantages):
        assert values.dtype == torch.float64
    assert rollout.reward_terms[0].eq(0.1).all()


def test_a_step_whose_rewards_all_failed_teaches_nothing():
    made = collector(Runner([None] * 12, [1.0] * 12))
    rollout = made.reward(made.sample(1))
    assert not rollout.batch.completion_mask.any() and not rollout.advantages.any()
    metrics = measured(rollout)
    assert metrics["reward/invalid"] == 1 and metrics["reward/mean"] != metrics["reward/mean"]  # NaN, null in the file


def test_c08_mask_truncated_leaves_rows_out_of_the_loss_and_in_the_baseline():
    kept = collector(Runner(A, B), mask_truncated=True)
    drawn = kept.sample(1)
    finished = drawn.completions.finished
    assert 0 < finished.sum() < 12
    rollout = kept.reward(drawn)
    whole = collector(Runner(A, B)).reward(drawn)
    assert torch.equal(rollout.advantages, whole.advantages)
    assert torch.equal(whole.batch.completion_mask, drawn.completions.completion_mask)
    assert torch.equal(rollout.batch.completion_mask, drawn.completions.completion_mask & finished[:, None])
    for metrics in (measured(rollout), measured(whole)):
        assert metrics["completion/truncated"] == pytest.approx(1 - finished.double().mean().item())
        assert metrics["tokens/sampled"] == drawn.completions.completion_mask.sum()


def test_c19_what_was_sampled_is_what_is_learned_and_graded():
    texts, golds = [], []
    made = collector(Runner(lambda text, _: texts.append(text) or 0.0, lambda _, p: golds.append(p.answer) or 0.0))
    drawn = made.sample(2)
    rollout = made.reward(drawn)
    assert texts == drawn.completions.texts and not any("##" in text for text in texts)
    assert golds == [problem.answer for problem in drawn.problems for _ in range(4)]
    assert torch.equal(rollout.batch.completion_ids, drawn.completions.completion_ids)
    assert torch.equal(rollout.batch.sampling_logprobs, drawn.completions.sampling_logprobs)
    asked = [runs.digit_tokenizer().decode(ids) for ids in rollout.batch.prompt_ids]
    assert asked == [problem.prompt for problem in drawn.problems]
    places = draw_prompts(5, 3, 0, 2)
    assert [problem.prompt for problem in drawn.problems] == [PROBLEMS[place].prompt for place in places]
    rows = [row for group in rollout.batch.completions() for row in group]
    assert [len(row) for row in rows] == drawn.completions.completion_mask.sum(1).tolist()


def test_c28_c31_a_step_is_drawn_alike_whatever_was_drawn_before():
    one, other = collector(Runner(A, B)), collector(Runner(A, B))
    for step in (1, 2, 3):
        last = one.sample(step)
    again = other.sample(3)
    assert torch.equal(last.completions.completion_ids, again.completions.completion_ids)
    assert last.batch.prompt_index == again.batch.prompt_index and last.batch.prompt_ids == again.batch.prompt_ids
    drawn = [other.sample(step).completions for step in (1, 2, 3)]
    long = [tuple(row) for each in drawn for row in each.completion_ids[each.completion_mask[:, 8]].tolist()]
    assert len(set(long)) == len(long) > 5  # every sample has its own stream


def test_an_unknown_advantage_is_an_error():
    with pytest.raises(ValueError, match="advantage is 'gae': must be one of grpo, dr_grpo, rloo"):
        collector(None, advantage="gae")


def test_transcripts_hold_every_completion_with_its_rewards(tmp_path):
    a = list(A)
    a[1] = None
    made = collector(Runner(a, B))
    drawn = made.sample(1)
    rollout = made.reward(drawn)
    path = tmp_path / "rollouts" / "step_000001.jsonl"
    write_transcripts(path, rollout, ("a", "b"), runs.digit_tokenizer())
    lines = runs.completions_of(path)
    assert [(line["prompt_index"], line["sample"]) for line in lines] == [(i, j) for i in range(3) for j in range(4)]
    assert [line["completion"] for line in lines] == drawn.completions.texts
    assert lines[1]["rewards"] == {"a": None, "b": 0.0} and lines[1]["reward"] is None and lines[1]["advantage"] == 0
    assert lines[3]["rewards"] == {"a": 1.0, "b": 2.0} and lines[3]["reward"] == 3.0
    assert [line["advantage"] for line in lines] == pytest.approx(rollout.advantages.flatten().tolist())
    assert [line["finished"] for line in lines] == drawn.completions.finished.tolist()
    assert [(line["question"], line["answer"]) for line in lines[::4]] == [
        (problem.info["question"], problem.answer) for problem in drawn.problems
    ]


def test_c60_each_line_is_a_group_and_has_the_prompt_that_was_really_asked(tmp_path):
    """Kind: a run does not leave what was expected of it: nobody could see what the model was given."""
    made = collector(Runner(A, B))
    drawn = made.sample(1)
    write_transcripts(tmp_path / "rollouts" / "1.jsonl", made.reward(drawn), ("a", "b"), runs.digit_tokenizer())
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "1.jsonl").read_text().splitlines()]
    asked = [runs.digit_tokenizer().decode(ids) for ids in drawn.batch.prompt_ids]
    assert [(line["prompt"], len(line["completions"])) for line in lines] == [(prompt, 4) for prompt in asked]


def test_real_rewards_grade_the_sampled_texts():
    with RewardRunner(("gsm8k.last_number", "gsm8k.format"), 5.0) as runner:
        made = collector(runner, rewards=("gsm8k.last_number", "gsm8k.format"))
        rollout = made.reward(made.sample(1))
    rows = zip(rollout.completions.texts, [p for p in rollout.problems for _ in range(4)], strict=True)
    right = [text.strip(" +=\n#")[-1:] == problem.answer for text, problem in rows]
    assert [value > 0 for value in rollout.reward_terms[0].flatten().tolist()].count(True) <= right.count(True)
    assert rollout.reward_terms[0].sum() > 0 and rollout.valid.all()
