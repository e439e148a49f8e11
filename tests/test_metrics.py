"""Numbers of a step: means that do not depend on how work is divided, and their names."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from grpo import distributed
from grpo.metrics import METRIC_NAMES, Sums, metric_names
from tests.fakes.runs import run_ranks


def test_means_sums_and_maxima():
    sums = Sums()
    sums.add("policy/kl", torch.tensor(6.0), torch.tensor(2))
    sums.add("policy/kl", 3, 4.0)
    sums.add("tokens/sampled", 10)
    sums.add("tokens/sampled", torch.tensor(5))
    sums.maximum("policy/sampler_gap_max", -2.0)
    sums.maximum("policy/sampler_gap_max", torch.tensor(-3.0))
    assert sums.reduce() == {"policy/kl": 1.5, "tokens/sampled": 15.0, "policy/sampler_gap_max": -2.0}


def test_a_mean_over_a_mask_leaves_out_whatever_stands_elsewhere():
    values = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]], requires_grad=True)
    sums = Sums()
    sums.add_where("policy/kl", values, torch.tensor([[True, True], [False, False]]))
    sums.add_where("policy/kl", torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    sums.add_where("policy/kl", torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    assert sums.reduce() == {"policy/kl": 1.0}  # (1 + 2 + 1 + 0) / 4
    assert all(not kept.requires_grad for kept in sums._values.values())


def test_sums_are_kept_in_float64_and_without_gradient():
    value = torch.full((), 1.0, requires_grad=True)
    sums = Sums()
    sums.add("optim/loss", torch.tensor(2.0**24), 1)  # in float32, one more would be lost
    sums.add("optim/loss", value, 0)
    assert sums.reduce() == {"optim/loss": 2.0**24 + 1}
    assert all(not kept.requires_grad for kept in sums._values.values())


def test_adding_does_not_change_what_was_given():
    total, largest = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    sums = Sums()
    for _ in range(2):
        sums.add("a", total, total)
        sums.maximum("b", largest)
    sums.add("once", total)
    assert total.item() == largest.item() == 1.0
    total += 100
    assert sums.reduce() == {"a": 1.0, "b": 1.0, "once": 1.0}


def test_merging_adds_what_another_has_collected_and_leaves_it_alone():
    ours, theirs = Sums(), Sums()
    for sums, value in ((ours, 1.0), (theirs, 4.0)):
        sums.add("policy/kl", value, 2)
        sums.add("tokens/sampled", value)
        sums.maximum("policy/sampler_gap_max", -value)
    theirs.add("optim/loss", 3.0, 1)
    before = theirs.reduce()
    for _ in range(2):
        ours.merge(theirs)
    merged = {"policy/kl": 1.5, "tokens/sampled": 9.0, "policy/sampler_gap_max": -1.0, "optim/loss": 3.0}
    assert ours.reduce() == merged and theirs.reduce() == before


def test_c04_a_mean_without_weight_has_no_value():
    sums = Sums()
    sums.add("policy/kl", torch.tensor(0.0), 0)
    assert math.isnan(sums.reduce()["policy/kl"])
    assert Sums().reduce() == {}


def test_a_maximum_of_nan_is_nan_whichever_comes_first(monkeypatch):
    for values in ((math.nan, 1.0), (1.0, math.nan)):
        sums = Sums()
        for value in values:
            sums.maximum("a", value)
        assert math.isnan(sums.reduce()["a"])
        ranks = [{("max", "a"): value} for value in values]
        monkeypatch.setattr(distributed, "gather_objects", lambda _, ranks=ranks: ranks)
        assert math.isnan(Sums().reduce()["a"])
        monkeypatch.undo()


SHARED = """
import json, torch
from grpo import distributed
from grpo.metrics import Sums
distributed.init("cpu", 60)
samples = [(0.1, 3), (0.7, 1), (-2.5, 8), (1e-9, 2), (5.0, 1)]
sums = Sums()
for value, weight in samples[distributed.rank()::2] if distributed.rank() < 2 else []:
    sums.add("policy/kl", value * weight, weight)
    sums.add("tokens/sampled", weight)
    sums.maximum("policy/sampler_gap_max", torch.tensor(value))
if distributed.is_main():
    sums.add("reward/mean", 1.0, 2)
print(json.dumps(sums.reduce()))
distributed.shutdown()
"""


def test_c32_metrics_do_not_depend_on_how_samples_are_spread(tmp_path):
    outputs = run_ranks(3, SHARED, tmp_path)  # the last rank has nothing to add
    for code, out, err in outputs:
        assert code == 0, err
        assert out == outputs[0][1]
    reduced = json.loads(outputs[0][1])
    assert set(reduced) == {"policy/kl", "tokens/sampled", "policy/sampler_gap_max", "reward/mean"}
    assert reduced["policy/kl"] == pytest.approx((0.3 + 0.7 - 20.0 + 2e-9 + 5.0) / 15, rel=1e-12)
    assert (reduced["tokens/sampled"], reduced["policy/sampler_gap_max"], reduced["reward/mean"]) == (15.0, 5.0, 0.5)


def test_names_of_the_reward_terms_are_those_of_the_config():
    names = metric_names(("gsm8k.format", "gsm8k.correctness"))
    assert names[:4] == ["step", "reward/mean", "reward/gsm8k.format", "reward/gsm8k.correctness"]
    assert [name for name in METRIC_NAMES if name not in names] == ["reward/<term>"]
    assert len(names) == len(set(names)) == len(METRIC_NAMES) + 1


def test_every_name_is_explained_in_the_docs():
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) >= set(METRIC_NAMES)
