"""When memory runs out in learning, on one rank of several: all cut smaller and start again, and no result changes."""

import copy
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from grpo import distributed
from grpo.config import from_yaml
from grpo.policy import Policy
from grpo.update import Learner
from tests.fakes import runs
from tests.fakes.models import tiny_policy
from tests.fakes.runs import assert_alike
from tests.whole.test_invariance import FIRST, assert_same, learned

CASE = ("several updates", *FIRST[0])  # old log-probabilities, a reference, two minibatches in each of two epochs
BUDGET, ROOM = 14, 10
"""What the case starts with, and how many tokens fit: the longest sequence has as many."""
PLACES = ("frozen", "forward", "backward")


def out_of_memory(*_) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def with_room_for(tokens: int, place: str, policy: Policy) -> Policy:
    """A copy that runs out of memory over larger trees: without gradient, with gradient, or half-way in backward."""
    policy = copy.deepcopy(policy)

    def after_forward(_, args, output):
        if len(args[0].input_ids) > tokens and place == ("forward" if torch.is_grad_enabled() else "frozen"):
            out_of_memory()

    def after_first_layer(_, args, output):
        if args[0].shape[-2] > tokens and output.requires_grad and place == "backward":
            output.register_hook(out_of_memory)  # by then the head and the last layer have their gradients

    policy.register_forward_hook(after_forward)
    policy.model.base_model.layers[0].register_forward_hook(after_first_layer)
    return policy


def learn_all(out: Path | None = None) -> dict:
    """The case at every place, on rank 1 only where there are several; each rank saves its results."""
    torch.use_deterministic_algorithms(True)
    distributed.init("cpu", 120)
    policy = tiny_policy(precision="fp64")
    torch.set_default_dtype(torch.float64)
    small = distributed.rank() == distributed.world_size() - 1
    results = {place: learned(*CASE, with_room_for(ROOM if small else 10**6, place, policy)) for place in PLACES}
    results["none"] = learned(*CASE, copy.deepcopy(policy))
    if out is not None:
        torch.save(results, f"{out}_{distributed.rank()}.pt")
        distributed.shutdown()
    return results


@pytest.fixture(scope="module")
def alone() -> dict:
    results = learn_all()
    torch.set_default_dtype(torch.float32)
    return results


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks") / "learned"
    ranks = runs.start_ranks(partial(learn_all, out), 2, out)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    return [torch.load(f"{out}_{r}.pt") for r in (0, 1)]


@pytest.mark.parametrize("place", PLACES)
def test_c01_c03_weights_and_metrics_are_those_of_a_run_that_had_the_memory(alone, together, place):
    assert alone["none"]["max_tokens"] == BUDGET
    for result in (alone[place], together[0][place], together[1][place]):
        assert result["max_tokens"] == BUDGET // 2  # agreed, though one rank alone has failed
        assert_same(alone["none"], result)


@pytest.mark.parametrize("place", PLACES)
def test_c01_weights_are_equal_to_the_bit_on_all_ranks(together, place):
    one, other = (ranks[place]["gradient"] for ranks in together)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("place", PLACES)
def test_one_sequence_that_does_not_fit_ends_the_run_with_a_sentence(place):
    policy = with_room_for(4, place, tiny_policy(precision="fp64"))
    torch.set_default_dtype(torch.float64)
    said = r"max_tokens_per_microbatch is \d+: out of memory in learning from one sequence, .* max_new_tokens"
    with pytest.raises(ValueError, match=said):
        learned(*CASE, policy)
    assert all(parameter.grad is None for parameter in policy.parameters())


# Whole runs.

WARNING = r"warning: out of memory in learning; .* max_tokens_per_microbatch (\d+) instead of (\d+), "


def short_of_memory(rank: int = 1) -> None:
    """From now on only so many tokens can be learned from at once on this rank, and fewer from the second step on."""
    if os.environ.get("RANK") != str(rank):
        return
    forward, learn, limits = Policy.forward, Learner.learn, [20]

    def limited(self, tree, temperature):
        if torch.is_grad_enabled() and len(tree.input_ids) > limits[-1]:
            out_of_memory()
        return forward(self, tree, temperature)

    def limiting(self, batch, step, *more):
        limits.append(20 if step == 1 else 10)
        return learn(self, batch, step, *more)

    Policy.forward, Learner.learn = limited, limiting


def test_a_run_goes_on_with_the_smaller_number_and_so_does_its_continuation(tmp_path):
    model, data = runs.save_digits(tmp_path / "model"), runs.write_problems(tmp_path / "data")
    argv = {name: runs.flags(model, data, tmp_path, name, resume="auto") for name in ("wide", "short")}
    runs.run(argv["wide"], tmp_path / "wide")

    starts = {"stopped": ["--num_steps", "2"], "resumed": []}
    for name, more in starts.items():
        ranks = runs.start_train_ranks([*argv["short"], *more], 2, tmp_path / name, before=short_of_memory)
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
        found = [tuple(map(int, pair)) for pair in re.findall(WARNING, ranks[0].stdout)]
        assert from_yaml(tmp_path / "short" / "config.yaml").max_tokens_per_microbatch == 8
        # A sentence for each step in which it happened; the continuation knows from the start.
        assert found == ([(16, 4096), (8, 16)] if name == "stopped" else [])
        assert ranks[1].stdout == ""
    assert_alike(tmp_path / "wide", tmp_path / "short")


def test_a_rank_that_fails_before_its_forward_leaves_nobody_waiting(tmp_path):
    """In the second update: DDP lays its buckets out anew, together, in the forward after its first backward."""
    model, data = runs.save_digits(tmp_path / "model"), runs.write_problems(tmp_path / "data")
    argv = {name: runs.flags(model, data, tmp_path, name, num_epochs=2, num_steps=3) for name in ("wide", "short")}
    runs.run(argv["wide"], tmp_path / "wide")
    before = partial(runs.at, "grpo.update:Learner._loss", 2, out_of_memory, 1)
    ranks = runs.start_train_ranks(argv["short"], 2, tmp_path / "short", before=before)
    assert [rank.wait(60) for rank in ranks] == [0, 0], ranks[0].stderr
    assert "2048 instead of 4096" in ranks[0].stdout
    assert_alike(tmp_path / "wide", tmp_path / "short")
