"""What must change nothing: how rows are cut into micro-batches, and over how many processes a run is spread."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from grpo import distributed
from grpo.batch import Batch
from grpo.config import Config
from grpo.losses import LOSSES
from grpo.metrics import Sums
from grpo.policy import frozen_copy, shard
from grpo.update import Learner
from grpo.weighting import WEIGHTINGS
from tests.fakes import runs
from tests.fakes.models import tiny_policy

COMBINATIONS = list(product(LOSSES, WEIGHTINGS))
FIRST = COMBINATIONS[:1]
LENGTHS = [3, 1, 5, 2, 4, 0, 1, 6, 2, 3]  # of 5 prompts, 2 completions each; a row with nothing to learn from
CASES = {
    "one cut": {},
    "some cuts": {"max_tokens_per_microbatch": 14},
    "a cut per row": {"max_tokens_per_microbatch": 1},
    "several updates": {"minibatch_size": 4, "num_epochs": 2, "max_tokens_per_microbatch": 14},
    "two prompts": {"max_tokens_per_microbatch": 1},  # fewer than ranks
    "one rank masked": {"max_tokens_per_microbatch": 1},
    "all masked": {},
    "high entropy": {"entropy_share": 0.4},
    "high entropy, cut": {"entropy_share": 0.4, "max_tokens_per_microbatch": 1},
    "high entropy, several updates": {"entropy_share": 0.4, "minibatch_size": 4, "max_tokens_per_microbatch": 14},
    "gaps": {"max_tokens_per_microbatch": 14},
    "gaps, several updates": {"minibatch_size": 4, "num_epochs": 2, "max_tokens_per_microbatch": 14},
}
CUTS = list(CASES)[:3]
SPREAD = [("none", 2), ("none", 4), ("full", 2), ("hybrid", 4), pytest.param(("full", 4), marks=pytest.mark.slow)]
"""The option `shard`, and the number of processes."""


def experience(case: str) -> Batch:
    """A fixed batch of unequal lengths, whose ratios are not 1."""
    lengths = torch.tensor(LENGTHS)
    if case == "one rank masked":
        lengths[[0, 1, 4, 5, 8, 9]] = 0  # rank 0 of 2; ranks 0 and 2 of 4
    if case == "all masked":
        lengths[:] = 0
    random = torch.Generator().manual_seed(0)
    B, T = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(T) < lengths[:, None]
    draw = partial(torch.randn, generator=random, dtype=torch.float64)
    batch = Batch(
        prompt_ids=[[7, 8, 9][: 1 + i % 3] + [20 + i] for i in range(B // 2)],
        completion_ids=torch.where(mask, torch.randint(257, (B, T), generator=random), 0),
        completion_mask=mask,
        advantages=draw(B),
        sampling_logprobs=torch.where(mask, -5 + draw(B, T), 0),
        old_logprobs=torch.where(mask, -5 + draw(B, T), 0),
        prompt_index=list(range(B // 2)),
    )
    if case.startswith("gaps"):
        batch.prompt_index = [0, 5, 6, 8, 14]  # what filtering leaves of a larger step
    return batch.select([0, 1]) if case == "two prompts" else batch


def learned(case: str, loss: str, weighting: str, policy, how: str = "none") -> dict:
    """Metrics and gradient of this rank's share (plain descent at rate 1: weights move by the gradient)."""
    batch = experience(case)
    mine = batch.select(list(range(distributed.rank(), len(batch.prompt_ids), distributed.world_size())))
    options = {"max_tokens_per_microbatch": 4096, "learning_rate": 0.1 if "several updates" in case else 1.0}
    config = Config(
        **{"precision": "fp64", "group_size": 2, "max_new_tokens": 7, "kl_coef": 0.3, "max_grad_norm": 0.0}
        | {"loss": loss, "weighting": weighting, "clip_low": 0.5, "clip_high": 0.5, "shard": how}
        | options
        | CASES[case]
    )
    reference = frozen_copy(policy)
    with torch.no_grad():
        reference.model.get_input_embeddings().weight.mul_(1.1)
    shard(reference, how)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    learner = Learner(config, policy, reference)
    learner.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    sums = Sums()
    finite = learner.learn(mine, 1, sums)
    gradient = {name: before[name] - distributed.whole(p) for name, p in policy.named_parameters()}
    return {"metrics": sums.reduce(), "gradient": gradient, "finite": finite, "max_tokens": learner.max_tokens}


def learn_all(in_full: list[str], out: Path | None = None, how: str = "none") -> dict:
    """`learned` for every case, those of `in_full` in every combination. On several ranks: each saves its results."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # machines of two processes, where that matters
    torch.use_deterministic_algorithms(True)
    distributed.init("cpu", 120)
    policy = tiny_policy(precision="fp64")
    torch.set_default_dtype(torch.float64)
    results = {
        (case, loss, weighting): learned(case, loss, weighting, copy.deepcopy(policy), how)
        for case in CASES
        for loss, weighting in (COMBINATIONS if case in in_full else FIRST)
    }
    if out is not None:
        torch.save(results, f"{out}_{distributed.rank()}.pt")
        distributed.shutdown()
    return results


@pytest.fixture(scope="module")
def alone() -> dict:
    results = learn_all(CUTS)
    torch.set_default_dtype(torch.float32)
    return results


@pytest.fixture(scope="module", params=SPREAD, ids=str)
def together(request, tmp_path_factory) -> list[dict]:
    """The results of every rank."""
    how, world_size = request.param
    out = tmp_path_factory.mktemp("ranks") / "learned"
    ranks = runs.start_ranks(partial(learn_all, ["some cuts"], out, how), world_size, out)
    assert [rank.wait() for rank in ranks] == [0] * world_size, ranks[0].stderr
    return [torch.load(f"{out}_{r}.pt") for r in range(world_size)]


def assert_same(one: dict, other: dict) -> None:
    assert one["finite"] == other["finite"]
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-9, abs=1e-12)
    assert one["gradient"].keys() == other["gradient"].keys()
    for name in one["gradient"]:
        torch.testing.assert_close(one["gradient"][name], other["gradient"][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("loss", "weighting"), COMBINATIONS)
def test_c01_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(alone, loss, weighting):
    whole = alone["one cut", loss, weighting]
    assert abs(whole["metrics"]["optim/loss"]) > 1e-3 and whole["metrics"]["optim/grad_norm"] > 1e-3
    for case in CUTS[1:]:
        assert_same(whole, alone[case, loss, weighting])


def test_c01_c03_c04_any_world_size_gives_the_same_loss_and_gradient(alone, together):
    """DDP averages gradients over ranks: if that were not undone they would be too small by the world size."""
    for ranks in together:
        assert len(ranks) == len(COMBINATIONS) + len(CASES) - 1
        for case in ranks:
            assert_same(alone[case], ranks[case])


def test_c01_the_threshold_of_entropies_is_that_of_the_step_however_it_is_cut(alone):
    whole = alone["high entropy", *FIRST[0]]
    assert_same(whole, alone["high entropy, cut", *FIRST[0]])
    assert whole["metrics"]["policy/entropy_share"] == 12 / 27  # 0.4 of 27 tokens are 10.8; two siblings are equal


@pytest.mark.parametrize("case", ["some cuts", "several updates"])
def test_c55_groups_whose_numbers_have_gaps_are_all_learned_from(alone, together, case):
    """Kind: what comes after the rewards assumes that a step has groups 0 to N - 1. Filtering leaves gaps.

    Every group counts in gradient and denominator, on one rank and on several.
    """
    gaps = ("gaps, several updates" if case == "several updates" else "gaps", *FIRST[0])
    for results in (alone, *together):
        assert_same(alone[case, *FIRST[0]], results[gaps])


def test_c01_gradients_are_equal_to_the_bit_on_all_ranks(together):
    for case, result in together[0].items():
        for other in together[1:]:
            assert all(torch.equal(result["gradient"][name], g) for name, g in other[case]["gradient"].items()), case


def test_c04_ranks_without_anything_to_learn_from_make_no_nan(alone):
    for (case, *_), result in alone.items():
        assert result["finite"]
        moved = sum(float(gradient.abs().sum()) for gradient in result["gradient"].values())
        assert (moved == 0) if case == "all masked" else (0 < moved < float("inf")), case


# Whole runs.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, str, Path]:
    """(model, data, where the runs go)."""
    place = tmp_path_factory.mktemp("runs")
    return runs.save_digits(place / "model"), runs.write_problems(place / "data"), place


OPTIONS = {
    "prompts_per_step": 5,
    "minibatch_size": 8,
    "num_epochs": 2,
    "eval_every": 2,
    "final_eval": True,
    "max_tokens_per_microbatch": 20,
    "advantage": "batch_std",  # from statistics of the whole step, as is
    "whiten": True,
}


@pytest.fixture(scope="module")
def by_one(inputs) -> Path:
    model, data, place = inputs
    runs.run(runs.flags(model, data, place, "one", **OPTIONS), place / "one")
    return place / "one"


@pytest.mark.parametrize(("how", "world_size"), [*SPREAD[:3], pytest.param("full", 3, marks=pytest.mark.slow)])
def test_c28_c32_c33_any_world_size_draws_the_same_completions_and_makes_the_same_updates(
    inputs, by_one, how, world_size
):
    """Five prompts on two and on four processes: none is dropped, and what a rank draws does not depend on it."""
    model, data, place = inputs
    name, options = f"by_{world_size}_{how}", OPTIONS | {"shard": how}
    ranks = runs.start_train_ranks(runs.flags(model, data, place, name, **options), world_size, place / name)
    assert [rank.wait() for rank in ranks] == [0] * world_size, ranks[0].stderr
    runs.assert_alike(by_one, place / name)
    for line in runs.transcripts(place / name)["step_000001.jsonl"]:
        assert line["prompt_index"] in range(5)
    tables = [json.loads((run / "eval" / "eval.json").read_text()) for run in (by_one, place / name)]
    assert tables[0] == tables[1]
    assert [bool(rank.stdout) for rank in ranks] == [True] + [False] * (world_size - 1)  # rank 0 alone speaks


def test_fewer_prompts_than_processes(inputs):
    model, data, place = inputs
    options = {"prompts_per_step": 1, "num_steps": 2, "kl_coef": 0.0, "advantage": "batch_std"}
    runs.run(runs.flags(model, data, place, "single", **options), place / "single")
    ranks = runs.start_train_ranks(runs.flags(model, data, place, "idle", **options), 3, place / "idle")
    assert [rank.wait() for rank in ranks] == [0, 0, 0], ranks[0].stderr
    lines = [runs.timeless(runs.metrics(place / name)) for name in ("single", "idle")]
    assert lines[0][0]["policy/kl"] is None and lines[0][0]["policy/entropy"] > 0
    for line, other in zip(*lines, strict=True):
        runs.assert_close(line, other)


def test_a_run_may_change_its_number_of_processes_when_it_is_resumed(inputs, by_one):
    model, data, place = inputs
    argv = runs.flags(model, data, place, "moved", **OPTIONS, resume="auto")
    assert runs.start(argv, place / "moved", before=runs.killed("grpo.update:Learner.learn", 4)).wait() == -9
    ranks = runs.start_train_ranks(argv, 2, place / "moved")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    runs.assert_alike(by_one, place / "moved")


@pytest.mark.slow
def test_the_embedded_model_with_shots_on_two_processes(tmp_path):
    """Exemplars are common to all prompts: the trunk of the tree, which each process computes for itself."""
    options = {"data": "arithmetic", "num_shots": 2, "prompts_per_step": 5, "max_new_tokens": 40, "num_steps": 3}
    options |= {"max_prompt_tokens": 512, "kl_coef": 0.02, "rewards": "gsm8k.format,gsm8k.correctness"}
    options |= {"learning_rate": 2e-4, "minibatch_size": 8, "reward_weights": "1,1"}
    argv = {name: runs.flags("embedded", "none", tmp_path, name, **options) for name in ("one", "two")}
    runs.run(argv["one"], tmp_path / "one")
    ranks = runs.start_train_ranks(argv["two"], 2, tmp_path / "two")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    runs.assert_alike(tmp_path / "one", tmp_path / "two")
    lines = runs.metrics(tmp_path / "one")
    assert all(line["optim/grad_norm"] > 0 for line in lines)
    # Tokens of the trie: far fewer than every completion with its whole prompt.
    assert all(line["tokens/computed"] < 0.4 * (line["tokens/sampled"] + 20 * 200) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "full"])
def test_torchrun_starts_the_same_run(inputs, by_one, how):
    model, data, place = inputs
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, *runs.flags(model, data, place, f"torchrun_{how}", **OPTIONS | {"shard": how})]
    done = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"base model: {model}\n" in done.stdout
    runs.assert_alike(by_one, place / f"torchrun_{how}")
