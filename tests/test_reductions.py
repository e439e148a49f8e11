"""The graph of reductions: in a limit or a special case, one entry of a table is another. About fifty exact identities.

An edge names the entries that it ties, and gives two tensors that must be equal. An entry without an edge fails. The
formulas of other trainers that are written out here are those of the commits in `docs/algorithm.md`.

That page shows the graph. To draw it again, after an edge is added:

    python -m tests.test_reductions
"""

import math
import re
from pathlib import Path

import pytest
import torch

from grpo.advantages import ADVANTAGES, combine, whiten
from grpo.corrections import CORRECTIONS
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.objective import objective
from grpo.weighting import WEIGHTINGS

PAGE = Path(__file__).parents[1] / "docs" / "algorithm.md"
TABLES = {"loss": LOSSES, "advantage": ADVANTAGES, "weighting": WEIGHTINGS, "kl": KL, "correction": CORRECTIONS}
EDGES = {}


def edge(*entries):
    """The function below is an edge that ties these entries, each `table.name`."""

    def register(function):
        EDGES[function.__name__] = (entries, function)
        return function

    return register


random = torch.Generator().manual_seed(0)
B, T, G = 6, 4, 3
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
OLD = -3 * torch.rand(B, T, generator=random, dtype=torch.float64) - 0.1
NEW = (OLD + 0.6 * torch.randn(B, T, generator=random, dtype=torch.float64)).clamp(max=-1e-3)
REF, SAMPLED = OLD - 0.2, OLD + 0.3 * torch.randn(B, T, generator=random, dtype=torch.float64)
A = torch.randn(B, generator=random, dtype=torch.float64)
BOUNDS, NO_BOUNDS = {"clip_low": 0.2, "clip_high": 0.3}, {"clip_low": 1.0, "clip_high": math.inf}
REWARDS = torch.tensor([[1, 0, 0, 3], [0.5, 2, -1, 0], [0, 0, 1, 0]], dtype=torch.float64)
RIGHT = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.float64)


def learned(loss, logprobs=NEW, old=OLD, advantages=A, mask=MASK, **constants):
    """[2,B,T]: value per token, and gradient of their mean over tokens, rows alike."""
    logprobs = logprobs.clone().requires_grad_()
    value = LOSSES[loss](logprobs, old, advantages, mask, **constants).per_token_loss
    (value / mask.sum(-1, keepdim=True)).sum().backward()
    return torch.stack([value.detach(), logprobs.grad])


def gradient(loss, *inputs, **options):
    return learned(loss, *inputs, **options)[1]


def one_token(loss, **options):
    """Rows of one token each."""
    column = [x[MASK][:, None] for x in (NEW, OLD)]
    return learned(loss, *column, A[:, None].expand(B, T)[MASK], torch.ones_like(column[0]).bool(), **options)


def penalty(kl, old=OLD):
    """[2,B,T]: value, and gradient of the sum."""
    logprobs = NEW.clone().requires_grad_()
    value = KL[kl](logprobs, REF, old)
    value.sum().backward()
    return torch.stack([value.detach(), logprobs.grad])


def weights(weighting, mask=MASK, **facts):
    return WEIGHTINGS[weighting](mask, dtype=torch.float64, **facts)


def factor(correction, old=OLD, sampled=SAMPLED, advantages=A, mask=MASK, now=NEW, **bounds):
    return CORRECTIONS[correction](now, old, sampled, advantages, mask, **bounds)


WIDE = {"correction_floor": 0.0, "correction_cap": math.inf}
NARROW = {"correction_floor": 1.0, "correction_cap": 1.0}


# ---- losses
@edge("loss.grpo", "loss.reinforce")
def grpo_without_a_step_between_is_reinforce():
    return gradient("grpo", OLD, **BOUNDS), gradient("reinforce", OLD, **BOUNDS)


@edge("loss.grpo")
def grpo_with_ratio_max_is_the_dual_clip_of_verl():
    ratio, per_row = (NEW - OLD).exp(), A[:, None]
    clipped = torch.maximum(-ratio * per_row, -ratio.clamp(0.8, 1.3) * per_row)
    verl = torch.where(per_row < 0, torch.minimum(clipped, -1.5 * per_row), clipped) * MASK
    return learned("grpo", **BOUNDS, ratio_max=1.5)[0], verl


@edge("loss.grpo")
def grpo_with_ratio_max_is_the_delta_of_trl():
    ratio, per_row = (NEW - OLD).exp(), A[:, None]
    trl = -torch.minimum(ratio.clamp(max=1.5) * per_row, ratio.clamp(0.8, 1.3) * per_row) * MASK
    return learned("grpo", **BOUNDS, ratio_max=1.5)[0], trl


@edge("loss.gspo", "loss.grpo")
def gspo_of_rows_of_one_token_is_grpo():
    return one_token("gspo", **BOUNDS), one_token("grpo", **BOUNDS)


@edge("loss.gspo_token", "loss.gspo")
def gspo_token_with_one_advantage_in_a_row_is_gspo():
    return learned("gspo_token", **BOUNDS), learned("gspo", **BOUNDS)


@edge("loss.gmpo", "loss.gspo")
def gmpo_without_bounds_is_gspo():
    return learned("gmpo", **NO_BOUNDS), learned("gspo", **NO_BOUNDS)


@edge("loss.gmpo", "loss.grpo")
def gmpo_of_rows_of_one_token_is_grpo():
    return one_token("gmpo", **BOUNDS), one_token("grpo", **BOUNDS)


@edge("loss.cispo", "loss.grpo")
def cispo_without_bounds_has_the_gradient_of_grpo_without_bounds():
    return gradient("cispo", **NO_BOUNDS), gradient("grpo", **NO_BOUNDS)


@edge("loss.cispo", "loss.reinforce")
def cispo_with_bounds_of_0_is_reinforce():
    return learned("cispo", clip_low=0.0, clip_high=0.0), learned("reinforce", **BOUNDS)


@edge("loss.sapo", "loss.grpo")
def sapo_with_an_open_gate_has_the_gradient_of_grpo_without_bounds():
    return gradient("sapo", tau_pos=1e-5, tau_neg=1e-5), gradient("grpo", **NO_BOUNDS)


@edge("loss.sapo", "loss.reinforce")
def sapo_without_a_step_between_is_reinforce():
    return gradient("sapo", OLD), gradient("reinforce", OLD, **BOUNDS)


@edge("loss.dppo_tv", "loss.grpo")
def dppo_tv_of_everything_is_grpo_without_bounds():
    return learned("dppo_tv", tv_max=1.0), learned("grpo", **NO_BOUNDS)


@edge("loss.dppo_kl", "loss.grpo")
def dppo_kl_of_everything_is_grpo_without_bounds():
    return learned("dppo_kl", binary_kl_max=math.inf), learned("grpo", **NO_BOUNDS)


@edge("loss.dppo_kl", "loss.dppo_tv")
def dppo_of_nothing_leaves_the_tokens_that_come_back():
    return learned("dppo_kl", binary_kl_max=0.0), learned("dppo_tv", tv_max=0.0)


@edge("loss.dro", "loss.reinforce")
def dro_without_a_tie_is_reinforce():
    return learned("dro", dro_beta=0.0), learned("reinforce", **BOUNDS)


@edge("loss.dro", "loss.reinforce")
def dro_is_reinforce_with_less_advantage_where_the_ratio_grew():
    return gradient("dro", dro_beta=0.3), gradient("reinforce", advantages=A[:, None] - 0.3 * (NEW - OLD), **BOUNDS)


@edge("loss.dro", "kl.k2")
def dro_without_an_advantage_is_k2_against_the_old_policy():
    return learned("dro", advantages=0 * A, dro_beta=0.3)[0], 0.3 * KL["k2"](NEW, OLD) * MASK


# ---- advantages
@edge("advantage.rloo", "advantage.dr_grpo")
def rloo_is_dr_grpo_times_n_over_n_minus_1():
    return ADVANTAGES["rloo"](REWARDS), ADVANTAGES["dr_grpo"](REWARDS) * 4 / 3


@edge("advantage.opo", "advantage.dr_grpo")
def opo_of_equal_lengths_is_dr_grpo():
    return ADVANTAGES["opo"](REWARDS, lengths=torch.full((3, 4), 7)), ADVANTAGES["dr_grpo"](REWARDS)


@edge("advantage.pkpo", "advantage.rloo")
def pkpo_of_one_sample_is_rloo():
    return ADVANTAGES["pkpo"](REWARDS, pass_k=1), ADVANTAGES["rloo"](REWARDS)


@edge("advantage.pkpo")
def pkpo_is_pass_at_k_training_without_its_sigma():
    """2508.10751: right 1 - R, wrong 1 - R - C(N-K-1, k-1) / C(N-1, k-1), with R = 1 - C(N-K, k) / C(N, k)."""
    N, k = 6, 3
    theirs = torch.zeros(N - 1, N, dtype=torch.float64)
    for row, K in enumerate(range(1, N)):
        missed = math.comb(N - K, k) / math.comb(N, k)
        theirs[row, :K], theirs[row, K:] = missed, missed - math.comb(N - K - 1, k - 1) / math.comb(N - 1, k - 1)
    right = (torch.arange(N) < torch.arange(1, N)[:, None]).double()
    return ADVANTAGES["pkpo"](right, pass_k=k) * (N - k) / (N * k), theirs


@edge("advantage.batch_std", "advantage.grpo")
def batch_std_of_one_group_is_grpo():
    return ADVANTAGES["batch_std"](REWARDS[:1]), ADVANTAGES["grpo"](REWARDS[:1])


@edge("advantage.reinforce_pp_baseline", "advantage.grpo")
def reinforce_pp_baseline_of_one_group_is_grpo():
    return ADVANTAGES["reinforce_pp_baseline"](REWARDS[:1]), ADVANTAGES["grpo"](REWARDS[:1])


@edge("advantage.reinforce_pp_baseline", "advantage.dr_grpo")
def reinforce_pp_baseline_is_dr_grpo_whitened():
    whitened = whiten(ADVANTAGES["dr_grpo"](REWARDS), torch.ones_like(REWARDS).bool())
    return ADVANTAGES["reinforce_pp_baseline"](REWARDS), whitened


@edge("advantage.reinforce_pp_baseline", "advantage.batch_std")
def both_spreads_of_the_step_are_equal_where_all_groups_have_one_mean():
    level = ADVANTAGES["dr_grpo"](REWARDS)
    return ADVANTAGES["reinforce_pp_baseline"](level), ADVANTAGES["batch_std"](level)


@edge("advantage.max_rl", "advantage.dr_grpo")
def max_rl_times_the_share_of_successes_is_dr_grpo():
    return ADVANTAGES["max_rl"](RIGHT) * RIGHT.mean(-1, keepdim=True), ADVANTAGES["dr_grpo"](RIGHT)


@edge("advantage.rloo")
def advantages_of_terms_add_up_to_that_of_the_sum():
    terms = torch.stack([REWARDS, RIGHT])
    return tuple(combine(terms, (2.0, -1.0), ADVANTAGES["rloo"], how) for how in ("rewards", "advantages"))


# ---- weightings
@edge("weighting.prompt_mean", "weighting.sequence_mean")
def prompt_mean_of_groups_of_one_is_sequence_mean():
    of_rows = weights("sequence_mean", num_tokens=16, num_sequences=B, max_new_tokens=9)
    return weights("prompt_mean", num_groups=B, group_tokens=MASK.sum(-1)), of_rows


@edge("weighting.prompt_mean", "weighting.token_mean")
def prompt_mean_of_one_group_is_token_mean():
    of_tokens = weights("token_mean", num_tokens=16, num_sequences=B, max_new_tokens=9)
    return weights("prompt_mean", num_groups=1, group_tokens=torch.full((B,), 16)), of_tokens


@edge("weighting.sequence_mean", "weighting.token_mean")
def sequence_mean_of_equal_lengths_is_token_mean():
    counts = {"mask": torch.ones(B, T).bool(), "num_tokens": B * T, "num_sequences": B, "max_new_tokens": 9}
    return weights("sequence_mean", **counts), weights("token_mean", **counts)


@edge("weighting.constant_length", "weighting.sequence_mean")
def constant_length_of_full_rows_is_sequence_mean():
    counts = {"mask": torch.ones(B, T).bool(), "num_tokens": B * T, "num_sequences": B, "max_new_tokens": T}
    return weights("constant_length", **counts), weights("sequence_mean", **counts)


# ---- KL
@edge("kl.k3_ratio", "kl.k2")
def the_gradient_of_r_k3_is_r_times_that_of_k2():
    return penalty("k3_ratio")[1], (NEW - OLD).exp() * penalty("k2")[1]


@edge("kl.k3_ratio", "kl.k3")
def r_k3_without_a_step_between_has_the_value_of_k3():
    return penalty("k3_ratio", NEW)[0], penalty("k3")[0]


@edge("kl.k1_plus", "kl.k1", "kl.k2")
def k1_plus_has_the_value_of_k1_and_the_gradient_of_k2():
    return penalty("k1_plus"), torch.stack([penalty("k1")[0], penalty("k2")[1]])


@edge("kl.k3_plus", "kl.k3", "kl.k2")
def k3_plus_has_the_value_of_k3_and_the_gradient_of_k2():
    return penalty("k3_plus"), torch.stack([penalty("k3")[0], penalty("k2")[1]])


@edge("kl.k1", "kl.k2")
def k1_in_the_reward_has_on_policy_the_gradient_of_k2_in_the_loss():
    found = []
    for kl, place in (("k1", "reward"), ("k2", "loss")):
        logprobs = OLD.clone().requires_grad_()
        parts = {"loss": LOSSES["reinforce"], "constants": BOUNDS, "correction": CORRECTIONS["none"], "bounds": {}}
        parts |= {"kl": KL[kl], "kl_coef": 0.3, "kl_in": place}
        objective(logprobs, OLD, SAMPLED, REF, A, MASK, **parts).per_token_loss.sum().backward()
        found.append(logprobs.grad)
    return found


# ---- corrections
def agreeing(correction, *bounds):
    """A sampler that agrees with the learner needs no correction: the factor is 1, whatever the bounds."""
    options = {name: NARROW[name] for name in bounds}

    @edge(f"correction.{correction}", "correction.none")
    def same():
        return factor(correction, OLD, OLD, -A.abs(), now=OLD, **options), factor("none")

    EDGES[f"{correction}_of_a_sampler_that_agrees_is_none"] = EDGES.pop("same")


for name in ("truncate", "truncate_row"):
    agreeing(name, "correction_cap")
for name in ("mask", "mask_row", "veto"):
    agreeing(name, "correction_floor", "correction_cap")
agreeing("opsm", "correction_floor")


@edge("correction.mask", "correction.truncate")
def mask_without_bounds_is_truncate_without_a_cap():
    return factor("mask", **WIDE), factor("truncate", correction_cap=math.inf)


@edge("correction.mask", "correction.none")
def mask_without_bounds_makes_the_ratio_to_the_sampler():
    """With grpo's own ratio it is that of the present policy to the sampler, whatever the old policy was."""
    corrected = factor("mask", **WIDE) * learned("grpo", **NO_BOUNDS)[0]
    return corrected, learned("grpo", old=SAMPLED, **NO_BOUNDS)[0] * factor("none")


@edge("loss.grpo", "correction.truncate", "correction.none")
def a_ratio_to_the_sampler_is_a_ratio_to_the_learner_with_truncate_without_a_cap():
    def whole(old, correction, **bounds):
        logprobs = NEW.clone().requires_grad_()
        functions = {"loss": LOSSES["grpo"], "constants": NO_BOUNDS, "kl": KL["k3"], "kl_coef": 0.0}
        functions |= {"correction": CORRECTIONS[correction], "bounds": bounds}
        value = objective(logprobs, old, SAMPLED, None, A, MASK, **functions).per_token_loss
        value.sum().backward()
        return torch.stack([value.detach(), logprobs.grad])

    return whole(SAMPLED, "none"), whole(OLD, "truncate", correction_cap=math.inf)


@edge("correction.truncate_row", "correction.truncate")
def truncate_row_of_rows_of_one_token_is_truncate():
    rows = {"old": OLD[MASK][:, None], "sampled": SAMPLED[MASK][:, None], "now": NEW[MASK][:, None]}
    rows |= {"mask": torch.ones_like(rows["old"]).bool(), "correction_cap": 1.1}
    return factor("truncate_row", **rows), factor("truncate", **rows)


@edge("correction.mask_row", "correction.veto")
def mask_row_of_rows_of_one_token_is_veto():
    rows = {"old": OLD[MASK][:, None], "sampled": SAMPLED[MASK][:, None], "now": NEW[MASK][:, None]}
    rows |= {"mask": torch.ones_like(rows["old"]).bool(), "correction_floor": 0.9, "correction_cap": 1.1}
    return factor("mask_row", **rows), factor("veto", **rows)


@edge("correction.veto", "correction.none")
def veto_without_bounds_is_none():
    return factor("veto", **WIDE), factor("none")


@edge("correction.opsm", "correction.mask_row")
def opsm_of_bad_rows_without_a_step_between_is_mask_row_without_a_cap():
    bounds = {"correction_floor": 0.95}
    return factor("opsm", advantages=-A.abs(), now=OLD, **bounds), factor("mask_row", **bounds, correction_cap=math.inf)


@edge("correction.opsm", "correction.none")
def opsm_of_good_rows_is_none():
    return factor("opsm", advantages=A.abs(), correction_floor=0.95), factor("none")


@pytest.mark.parametrize("name", EDGES)
def test_c09_in_this_case_one_is_the_other(name):
    ours, other = EDGES[name][1]()
    tolerance = 1e-4 if "open_gate" in name else 1e-10
    torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)
    assert ours.abs().max() > 0, "two zeros agree on nothing"


@pytest.mark.parametrize("entry", [f"{table}.{name}" for table, names in TABLES.items() for name in names])
def test_every_entry_of_a_table_has_an_edge(entry):
    assert any(entry in entries for entries, _ in EDGES.values())


def test_the_numbers_exercise_what_they_should():
    """Bounds act on both sides, and factors of 0 and 1 both occur."""
    for loss in ("grpo", "gspo", "gmpo"):
        clipped = LOSSES[loss](NEW, OLD, A, MASK, **BOUNDS).clipped.expand(B, T)
        assert 0 < clipped[MASK].sum() < MASK.sum(), loss
    assert ((NEW - OLD).exp()[MASK & (A < 0)[:, None]] > 1.5).any(), "ratio_max acts"
    for name in ("mask_row", "veto"):
        assert factor(name, correction_floor=0.9, correction_cap=1.2).unique().numel() == 2, name
    assert factor("opsm", advantages=-A.abs(), now=OLD, correction_floor=0.95).unique().numel() == 2


def drawn() -> str:
    """The graph as mermaid, with a box for each table, and below it every edge in words."""
    lines = ["```mermaid", "graph LR"]
    for table, names in TABLES.items():
        lines += [f"  subgraph {table}", *(f"    {table}_{name}[{name}]" for name in names), "  end"]
    pairs = {(entries[0], other) for entries, _ in EDGES.values() for other in entries[1:]}
    lines += [f"  {one} --- {other}".replace(".", "_") for one, other in sorted(pairs)]
    return "\n".join([*lines, "```", "", "```text", *(name.replace("_", " ") for name in EDGES), "```"])


def redrawn(page: str) -> str:
    """The page with what stands between the two comments drawn again."""
    begin, end = "<!-- python -m tests.test_reductions -->", "<!-- end of the graph -->"
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n\n{drawn()}\n\n{end}", page, flags=re.S)


def test_the_page_shows_the_graph():
    page = PAGE.read_text()
    assert drawn() in page and redrawn(page) == page, "to draw it again: python -m tests.test_reductions"


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text()))
