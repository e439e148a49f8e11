"""Problems in turn: permutations end to end, and refills that take the others first."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.prompts.order import draw_prompts


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31))
def test_the_prompts_of_all_steps_are_permutations_end_to_end(num_problems, prompts_per_step, seed):
    steps = 3 * num_problems // prompts_per_step + 2
    drawn = [place for step in range(1, steps) for place in draw_prompts(num_problems, prompts_per_step, seed, step)]
    assert len(drawn) == prompts_per_step * (steps - 1)
    epochs = [drawn[start : start + num_problems] for start in range(0, len(drawn), num_problems)]
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(num_problems))
    assert max(Counter(epochs[-1]).values()) == 1


def test_prompts_are_a_function_of_seed_and_step_and_epochs_differ():
    assert draw_prompts(50, 8, 3, 5) == draw_prompts(50, 8, 3, 5)
    assert len({tuple(draw_prompts(50, 50, seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}) == 6


def test_more_prompts_in_a_step_than_problems():
    assert Counter(draw_prompts(3, 9, 0, 1)) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize(("num_problems", "prompts_per_step"), [(12, 3), (10, 4), (3, 5)])
def test_refills_take_every_other_problem_before_the_step_s_own(num_problems, prompts_per_step):
    own = draw_prompts(num_problems, prompts_per_step, 0, 2)
    refills = [draw_prompts(num_problems, prompts_per_step, 0, 2, k) for k in range(1, 6)]
    assert {len(refill) for refill in refills} == {prompts_per_step}
    stream = [problem for refill in refills for problem in refill]
    others = num_problems - len(set(own))
    assert set(stream[:others]) == set(range(num_problems)) - set(own)
    assert sorted(stream[:num_problems]) == list(range(num_problems))


def test_a_refill_is_a_function_of_seed_step_and_its_number():
    seen = {tuple(draw_prompts(50, 8, seed, step, k)) for seed in (0, 1) for step in (1, 2) for k in (1, 2)}
    assert len(seen) == 8 and tuple(draw_prompts(50, 8, 1, 2, 2)) in seen
    of_all = {tuple(draw_prompts(8, 8, 0, step, 1)) for step in range(1, 6)}  # the step's own prompts are all there are
    assert len(of_all) == 5
