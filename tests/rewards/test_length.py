"""Penalties of length and repetition: golden numbers, and that each is a reward of -1 to 0."""

import pytest

import rewards
from data.problem import Problem
from rewards.length import repetition, soft_overlong, stop_properly

PROBLEM = Problem("", "18", {})


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0), (383, 0), (384, 0), (416, -0.25), (448, -0.5), (511, -127 / 128), (512, -1)]
)
def test_soft_overlong_is_that_of_dapo(length, value):
    assert soft_overlong("", PROBLEM, length=length, cap=512) == value


@pytest.mark.parametrize(("length", "value"), [(0, 0), (80, 0), (90, -0.5), (100, -1)])
def test_soft_overlong_with_another_cache(length, value):
    assert soft_overlong("", PROBLEM, length=length, cap=100, cache=20) == value


@pytest.mark.parametrize(("length", "value"), [(0, 0), (24, -0.25), (96, -1)])
def test_a_cap_below_the_cache_is_the_cache(length, value):
    assert soft_overlong("", PROBLEM, length=length, cap=96) == value


def test_what_is_cut_costs_one():
    assert stop_properly("", PROBLEM, finished=False) == -1
    assert stop_properly("", PROBLEM, finished=True) == 0


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        ([], 0),
        ([7, 7], 0),
        ([7, 7, 7], 0),
        ([7, 7, 7, 7], -1 / 2),
        ([7] * 12, -9 / 10),
        ([1, 2, 3, 4, 5], 0),
        ([1, 2, 3, 1, 2, 3, 1], -2 / 5),
        ([1, 2, 3, 3, 2, 1], 0),
    ],
)
def test_repetition_is_the_share_of_trigrams_that_were_there_before(tokens, value):
    assert repetition("", PROBLEM, tokens=tokens) == pytest.approx(value, abs=1e-15)


def test_repetition_of_other_lengths():
    assert repetition("", PROBLEM, tokens=[1, 2, 1, 2], n=1) == -0.5
    assert repetition("", PROBLEM, tokens=[1, 2, 1, 2], n=2) == pytest.approx(-1 / 3)


def test_they_are_rewards_and_ask_for_what_they_need():
    asked = {"soft_overlong": ("length", "cap"), "stop_properly": ("finished",), "repetition": ("tokens",)}
    for name, names in asked.items():
        assert f"length.{name}" in rewards._known()
        assert rewards.asks_for(rewards.load(f"length.{name}")) == names
        assert rewards.full_value(f"length.{name}") == 0
