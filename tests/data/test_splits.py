"""A seeded tenth is held out, and nothing is on both sides."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.splits import SPLITS, hold_out, part_of


@pytest.mark.parametrize(("n", "size"), [(0, 0), (1, 0), (2, 1), (10, 1), (100, 10), (5001, 500), (7473, 500)])
def test_a_tenth_at_most_five_hundred(n, size):
    kept, held_out = hold_out(list(range(n)), 0, at_most=500, key=str)
    assert (len(kept), len(held_out)) == (n - size, size)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30)), st.integers())
def test_the_two_sides_are_the_whole_in_order_and_share_no_key(numbers, seed):
    examples = list(enumerate(numbers))
    kept, held_out = hold_out(examples, seed, at_most=500, key=lambda example: str(example[1]))
    assert sorted(kept + held_out) == examples
    assert kept == sorted(kept) and held_out == sorted(held_out)
    assert not {number for _, number in kept} & {number for _, number in held_out}
    assert (kept, held_out) == hold_out(examples, seed, at_most=500, key=lambda example: str(example[1]))


def test_the_tenth_is_one_of_keys():
    kept, held_out = hold_out(["a"] * 60 + ["b"] * 60, 0, at_most=500, key=str)
    assert {len(set(kept)), len(set(held_out))} == {1}


def test_another_seed_holds_out_others():
    drawn = {tuple(hold_out(list(range(200)), seed, at_most=500, key=str)[1]) for seed in range(10)}
    assert len(drawn) == 10


def test_a_split_that_is_missing_is_held_out_of_train():
    def parts_of(*given):
        parts = {name: lambda name=name: [f"{name} {i}" for i in range(100)] for name in given}
        return {split: part_of(split, parts, 0, key=str) for split in SPLITS}

    assert {split: len(part) for split, part in parts_of("train").items()} == {"train": 81, "validation": 9, "test": 10}
    alone = parts_of("train")
    assert sorted(sum(alone.values(), [])) == sorted(f"train {i}" for i in range(100))
    both = parts_of("train", "test")
    assert both["test"] == [f"test {i}" for i in range(100)] and len(both["train"]) == 90
    assert {len(part) for part in parts_of(*SPLITS).values()} == {100}
