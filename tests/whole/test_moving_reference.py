"""Runs that renew the reference of the KL: a copy or a moving average, kept in checkpoints."""

from pathlib import Path

import pytest
import torch

import train
from tests.fakes import runs
from tests.fakes.runs import metrics, weights


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return runs.new_place(tmp_path_factory)


def begin(place: Path, name: str, **changes) -> Path:
    options = {"reference_sync_every": 1, "checkpoint_every": 1} | changes
    assert train.main(runs.flags(str(place / "model"), str(place / "data"), place, name, **options)) == 0
    return place / name


def test_after_a_copy_the_kl_is_exactly_0_and_grows_until_the_next(place):
    lines = metrics(begin(place, "copied", reference_sync_every=2, num_steps=5))
    assert [line["policy/kl"] == 0 for line in lines] == [True, False, True, False, True]
    reference, model = (checkpointed(place / "copied", 4, file) for file in ("reference", "model"))
    assert reference.keys() == model.keys() and all(torch.equal(reference[name], model[name]) for name in model)


def checkpointed(run: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return runs.load_file(run / "checkpoints" / f"step_{step:06d}" / f"{file}.safetensors")


def test_a_moving_average_is_the_recursion(place):
    run = begin(place, "average", reference_mix=0.25, num_steps=2, keep_checkpoints=9)
    base = weights(place / "model")
    base["lm_head.weight"] = base["model.embed_tokens.weight"]  # tied
    first, second = (checkpointed(run, step, "model") for step in (1, 2))
    reference = checkpointed(run, 2, "reference")
    assert len(reference) > 10
    for name, value in reference.items():
        old = base[name.removeprefix("model.")].double()
        expected = 0.25 * second[name] + 0.75 * (0.25 * first[name] + 0.75 * old)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_c30_resumed_between_two_copies_is_the_same_to_the_bit(place, precision):
    options = {"precision": precision, "reference_sync_every": 2, "reference_mix": 0.6, "num_steps": 6}
    whole = begin(place, f"whole_{precision}", **options)
    begin(place, f"halves_{precision}", **options | {"num_steps": 3})
    runs.assert_same_run(whole, begin(place, f"halves_{precision}", **options, resume="auto"))


def test_ranks_that_resume_have_the_reference_of_rank_0(place):
    options = {"reference_sync_every": 2, "reference_mix": 0.6}
    whole = begin(place, "alone", **options)
    begin(place, "spread", **options | {"num_steps": 2})
    again = runs.flags(str(place / "model"), str(place / "data"), place, "spread", **options | {"resume": "auto"},
                       checkpoint_every=1)  # fmt: skip
    ranks = runs.start_train_ranks(again, 2, place / "spread")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    for ours, theirs in zip(runs.timeless(metrics(whole)), runs.timeless(metrics(place / "spread")), strict=True):
        assert {name for name in ours if ours[name] is None} == {name for name in theirs if theirs[name] is None}
        numbers = [{name: value for name, value in line.items() if value is not None} for line in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-12)


def test_without_it_a_checkpoint_holds_no_reference(place):
    run = begin(place, "never", reference_sync_every=0, num_steps=1)
    assert not list(run.rglob("reference.safetensors"))
