"""Passes over micro-batches: as many on every rank, and made again with smaller ones when memory runs out."""

import pytest
import torch

from grpo import distributed
from grpo.budget import Budget, Pass
from grpo.kernels import heap
from tests.fakes.models import tiny_policy
from tests.test_microbatch import batch, size


@pytest.fixture
def budget() -> Budget:
    return Budget(tiny_policy(), 100)


def test_missing_micro_batches_are_a_token_that_predicts_nothing(budget, monkeypatch):
    monkeypatch.setattr(distributed, "all_max", lambda here: here + 2)
    made = Pass(budget, batch()).microbatches
    assert [len(micro.rows) for micro in made] == [3, 0, 0]
    assert size(made[1]) == 1 and len(made[1].tree.target) == 0


def test_a_pass_goes_over_the_rows_asked_for_and_may_be_made_again(budget):
    whole, some = Pass(budget, batch()), Pass(budget, batch(), [1, 2])
    for made, rows in ((whole, [0, 1, 3]), (some, [1]), (whole, [0, 1, 3])):
        assert [[micro.rows for micro in attempt] for attempt in made.attempts()] == [[rows]]
    assert budget.max_tokens == 100


def test_when_memory_runs_out_the_pass_starts_again_with_half_the_budget(budget):
    budget.max_tokens = 8
    computed, parameter = [], next(budget.policy.parameters())
    for attempt in Pass(budget, batch()).attempts():
        assert parameter.grad is None
        rows = []
        with attempt:
            for micro in attempt:
                parameter.grad = torch.ones_like(parameter)  # what a failed attempt leaves
                if size(micro) > 4:
                    raise torch.OutOfMemoryError
                rows.append(micro.rows)
        computed.append(rows)
    assert computed == [[], [[0, 1], [3]]] and budget.max_tokens == 4
    assert parameter.grad is not None  # of the attempt that succeeded


def test_freed_memory_is_given_back_before_each_micro_batch(budget, monkeypatch):
    budget.max_tokens, given = 4, []
    monkeypatch.setattr(heap, "give_back", lambda: given.append("freed"))
    for attempt in Pass(budget, batch()).attempts():
        times = [len(given) for _ in attempt]
    assert times == [1, 2]


def test_another_rank_that_ran_out_makes_this_one_start_again_too(budget, monkeypatch):
    there = iter([1, 1, 1, 0])  # micro-batches; out of memory; micro-batches; all well
    monkeypatch.setattr(distributed, "all_max", lambda here: torch.maximum(here, torch.tensor(next(there))))
    assert len(list(Pass(budget, batch()).attempts())) == 2
    assert budget.max_tokens == 50


def test_one_row_that_does_not_fit_is_a_sentence_and_leaves_no_gradient(budget):
    parameter = next(budget.policy.parameters())
    with pytest.raises(ValueError, match="max_tokens_per_microbatch is 1: out of memory in learning from one sequence"):
        budget.max_tokens = 1
        for attempt in Pass(budget, batch()).attempts():
            with attempt:
                for _ in attempt:
                    parameter.grad = torch.ones_like(parameter)
                    raise torch.OutOfMemoryError
    assert parameter.grad is None


def test_another_error_is_not_swallowed(budget):
    with pytest.raises(RuntimeError, match="a mistake"):
        for attempt in Pass(budget, batch()).attempts():
            with attempt:
                raise RuntimeError("a mistake")
    assert budget.max_tokens == 100
