"""Runs with each optimiser: they learn, and a run in two halves is the same to the bit."""

from pathlib import Path

import pytest
import torch

import train
from tests.fakes import runs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return runs.new_place(tmp_path_factory)


@pytest.mark.parametrize("options", [{"optimizer": "sgd", "sgd_momentum": 0.9}, {"optimizer": "muon"}], ids=str)
def test_c30_two_halves_are_the_whole(place, options):
    def begin(name: str, **changes) -> Path:
        asked = options | {"precision": "fp32"} | changes
        assert train.main(runs.flags(str(place / "model"), str(place / "data"), place, name, **asked)) == 0
        return place / name

    whole, halves = f"whole_{options['optimizer']}", f"halves_{options['optimizer']}"
    begin(whole)
    begin(halves, num_steps=2)
    begin(halves, resume="auto")
    runs.assert_same_run(place / whole, place / halves)
    base, final = runs.weights(place / "model"), runs.weights(place / whole / "final")
    assert not any(torch.equal(base[name], final[name]) for name in base if "_proj.weight" in name)
