"""Sharded runs: the numbers of DDP, checkpoints for any number of processes, and what happens where memory lacks."""

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from grpo.config import from_yaml
from grpo.kernels import compiled
from grpo.policy import shard
from tests.fakes import runs
from tests.fakes.models import tiny_policy

WAYS = [("none", 1), ("none", 2), ("full", 2), ("full", 3)]
"""The option `shard`, and the number of processes."""
QUICK = [(("none", 2), ("full", 3)), (("full", 2), ("full", 2))]
PAIRS = [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in product(WAYS, WAYS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return runs.new_place(tmp_path_factory)


def go(place: Path, name: str, how: str, world_size: int, codes=None, before=None, **changes) -> list:
    """The ended processes of a run, which goes on if it was begun."""
    options = {"resume": "auto", "shard": how, "kl_coef": 0.05} | changes
    argv = runs.flags(str(place / "model"), str(place / "data"), place, name, **options)
    ranks = runs.start_train_ranks(argv, world_size, place / f"{name}.log", before=before)
    assert [rank.wait() for rank in ranks] == (codes or [0] * world_size), ranks[0].stderr
    return ranks


@pytest.fixture(scope="module")
def uninterrupted(place) -> dict[str, Path]:
    """A run of one process, and a sharded one of two."""
    go(place, "one", "none", 1)
    go(place, "two", "full", 2)
    return {"one": place / "one", "two": place / "two"}


@pytest.mark.parametrize(("first", "then"), PAIRS)
def test_a_run_goes_on_with_other_shards_and_another_number_of_processes(place, uninterrupted, first, then):
    name = f"{first}-{then}".translate(str.maketrans("", "", "(',) "))
    go(place, name, *first, num_steps=2)
    go(place, name, *then)
    runs.assert_alike(uninterrupted["one"], place / name)
    if first == then == ("full", 2):
        runs.assert_same_run(uninterrupted["two"], place / name)


def test_adapters_are_sharded_too_and_their_base_is_the_reference(place):
    for name, how in (("whole", "none"), ("parts", "full")):
        go(place, name, how, 2, lora_rank=4)
    runs.assert_alike(place / "whole", place / "parts")
    one, other = (runs.load_file(place / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-9) for name in one)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"precision": "fp16", "activation_checkpointing": True}])
def test_under_autocast_the_first_step_has_no_kl(place, changes):
    lines = []
    for how in ("none", "full"):
        name = f"{how}_{changes['precision']}"
        go(place, name, how, 2, num_steps=1, **changes)
        lines += runs.metrics(place / name)
    assert [line["policy/kl"] for line in lines] == [0.0, 0.0]
    assert lines[0]["optim/grad_norm"] == pytest.approx(lines[1]["optim/grad_norm"], rel=1e-5)


def without_kernels() -> None:
    """Compiling traces as for a GPU, and runs plain operations."""
    compiled.SETTINGS = {"dynamic": True, "backend": "aot_eager"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"lag": 1}, {"reference_sync_every": 1}, {"optimizer": "sgd", "sgd_momentum": 0.5}, {"compile": True}],
    ids=str,
)
def test_shards_go_together_with_other_options(place, changes):
    name = "-".join(changes)
    for how in ("none", "full"):
        go(place, f"{name}_{how}", how, 2, before=without_kernels, **changes)
    runs.assert_alike(place / f"{name}_none", place / f"{name}_full")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def lacking(where: str, call: int):
    """For `before`: memory runs out there, on rank 1 alone."""
    return partial(runs.at, where, call, out_of_memory, 1)


def test_after_a_rehearsal_without_memory_the_next_start_takes_half(place):
    ended = go(place, "tried", "full", 2, [1, 2], lacking("grpo.update:Learner.rehearse", 1))
    assert "max_tokens_per_microbatch is 4096: out of memory in a rehearsal of learning" in ended[1].stderr
    assert "Traceback" not in ended[0].stderr + ended[1].stderr
    again = go(place, "tried", "full", 2)
    assert "max_tokens_per_microbatch is 2048 from now on" in again[0].stderr
    assert from_yaml(place / "tried" / "config.yaml").max_tokens_per_microbatch == 2048
    assert not (place / "tried" / "rehearsal").exists()
    assert "rehearsal" not in go(place, "tried", "full", 2, num_steps=5)[0].stderr


def test_memory_that_runs_out_later_is_one_sentence(place):
    ended = go(place, "late", "full", 2, [1, 2], lacking("grpo.update:Learner._loss", 2))
    assert "rank 1: train.py: error: shard: out of memory in learning from" in ended[1].stderr
    assert "Traceback" not in ended[0].stderr + ended[1].stderr


def test_what_transformers_computes_is_not_sharded(monkeypatch):
    monkeypatch.setattr("grpo.distributed.world_size", lambda: 2)
    said = "^shard is 'full': a GemmaForCausalLM runs as transformers wrote it, .*; must be none$"
    with pytest.raises(ValueError, match=said):
        shard(tiny_policy("gemma"), "full")
