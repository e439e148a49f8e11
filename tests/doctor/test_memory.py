"""Tokens, bytes and seconds of a step, worked out by hand for a model of round numbers."""

from dataclasses import replace

import pytest
import torch

from grpo.doctor.facts import sizes
from grpo.doctor.memory import (
    LEAST_TOKENS,
    MOST_TOKENS,
    USED,
    budget,
    by_holder,
    cache,
    exact,
    kept,
    least,
    peak,
    room,
    tokens,
    updates_per_step,
)
from grpo.doctor.speed import measured, seconds
from grpo.kernels import decode
from grpo.sampler import Sampler
from grpo.sampler.cache import DecodeAttention
from grpo.tree import pack
from tests.fakes import saved
from tests.fakes.known_facts import SIZES, config, facts
from tests.fakes.models import byte_tokenizer, tiny_policy

# 40 prompts of 100 tokens, 80 of them common, 4 prompts x 8 completions of 50 tokens
RECIPE = {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 60, "max_tokens_per_microbatch": 1000}
KNOWN = facts(prompt_tokens=(100,) * 40, shared_tokens=80, solution_tokens=(50,) * 10)


@pytest.fixture(autouse=True)
def without_triton(monkeypatch):
    monkeypatch.setattr(decode, "usable", lambda *_: False)


def test_tokens_of_a_step():
    step = tokens(config(**RECIPE), KNOWN)
    assert (step.sequences, step.typical, step.sampled) == (32, 50, 1600)
    assert step.prompts == 80 + 4 * 20
    assert step.learned == 1600 + 80 + 2 * 80  # two micro-batches: (1600 + 80) / (1000 - 80)


def test_a_solution_counts_up_to_the_limit_and_none_as_half_of_it():
    assert tokens(config(**RECIPE | {"max_new_tokens": 30}), KNOWN).typical == 30
    assert tokens(config(**RECIPE), facts(solution_tokens=())).typical == 30


@pytest.mark.parametrize(("changes", "updates"), [({}, 1), ({"num_epochs": 2}, 2), ({"minibatch_size": 24}, 2)])
def test_updates_per_step(changes, updates):
    assert updates_per_step(config(**RECIPE | {"num_epochs": 1} | changes)) == updates


def test_exact_memory_is_four_floats_a_weight_and_the_copies():
    parts = by_holder(config(**RECIPE, kl_coef=0.1), KNOWN)
    copy = 2 * 350_000_000 + 4 * 150_000_000  # linear layers in bfloat16, the rest in float32
    head = 2 * SIZES.vocabulary * SIZES.width  # rounded for sampling on a GPU
    assert exact(parts) == 16 * 500_000_000 + copy + copy + head
    assert exact(by_holder(config(**RECIPE, kl_coef=0.1, device="cpu"), KNOWN)) == 16 * 500_000_000 + copy + copy
    assert exact(by_holder(config(**RECIPE, precision="fp32"), KNOWN)) == 16 * 500_000_000
    assert exact(by_holder(config(**RECIPE, precision="fp64"), KNOWN)) == 32 * 500_000_000
    assert peak(parts) > exact(parts)


def test_several_processes_hold_the_sum_of_their_gradients_too():
    one, two = (by_holder(config(**RECIPE), replace(KNOWN, world_size=n)) for n in (1, 2))
    assert exact(two) - exact(one) == 4 * 500_000_000


def test_what_a_step_surely_takes():
    """Weights, two moments and copies all the time; then in turn the sampler's cache and the gradient."""
    known = replace(KNOWN, prompt_tokens=(90, 100, 100))
    held, sampling, learning = least(config(**RECIPE), known)
    copy = 2 * 350_000_000 + 4 * 150_000_000 + 2 * SIZES.vocabulary * SIZES.width
    assert held == 12 * 500_000_000 + copy and learning == 4 * 500_000_000
    assert sampling == cache(config(**RECIPE), known, 10)  # the shortest prompt has 10 tokens of its own


@pytest.mark.parametrize(
    ("precision", "kernels", "size"), [("fp32", True, 4), ("bf16", False, 4), ("bf16", True, 2), ("fp64", True, 8)]
)
def test_the_cache_is_the_trunk_once_a_branch_per_prompt_and_own_tokens_per_row(precision, kernels, size, monkeypatch):
    """4 prompts of 80 common and 20 own tokens, 8 rows each of up to 60 tokens, 24 layers, keys 128 wide."""
    monkeypatch.setattr(decode, "usable", lambda device, half: kernels and half)
    recipe = config(**RECIPE, precision=precision, compile=True)
    assert cache(recipe, KNOWN, 20) == 2 * 24 * 128 * size * (80 + 4 * 20 + 32 * 60)
    assert cache(recipe, replace(KNOWN, world_size=3), 20) == 2 * 24 * 128 * size * (80 + 2 * 20 + 16 * 60)
    assert cache(replace(recipe, compile=False), KNOWN, 20) == 2 * 24 * 128 * max(size, 4) * (80 + 4 * 20 + 32 * 60)


@pytest.mark.parametrize(("batch", "prompts", "rows"), [(3, 4, 32), (10, 10, 32), (40, 40, 40)])
def test_room_for_validation_is_what_a_batch_of_it_has_more(batch, prompts, rows):
    recipe = config(**RECIPE, eval_every=5, eval_batch=batch)
    assert room(recipe, KNOWN, validating=True) == (prompts, rows)
    assert cache(recipe, KNOWN, 20, validating=True) == 2 * 24 * 128 * 4 * (80 + prompts * 20 + rows * 60)
    never = replace(recipe, eval_every=0)
    assert room(recipe, KNOWN) == room(never, KNOWN, validating=True) == (4, 32)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_the_cache_is_what_the_sampler_holds(precision, monkeypatch):
    """Every tensor with a head's width that the attention holds when the first token of its own has been drawn."""
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [5, 6, 7, 30, 31, 32]]  # 3 common, at most 3 own
    policy = tiny_policy(precision=precision)
    held, begin = [], DecodeAttention.begin

    def look(attention):
        if not held:
            found = tensors(vars(attention))
            held.append(sum(t.numel() * t.element_size() for t in found if t.is_floating_point() and t.shape[-1] == 8))
        begin(attention)

    monkeypatch.setattr(DecodeAttention, "begin", look)
    if precision == "fp64":
        torch.set_default_dtype(torch.float64)
    sampler = Sampler(policy, byte_tokenizer())
    sampler.generate(prompts, group_size=2, max_new_tokens=5, temperature=1.0, seed=0, step=1)
    recipe = config(prompts_per_step=3, group_size=2, max_new_tokens=5, precision=precision)
    known = facts(sizes=sizes(policy.model), prompt_tokens=(4, 5, 6), shared_tokens=3)
    assert held == [cache(recipe, known, 3)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_packed_weights_are_what_the_sampler_packs(precision):
    if precision == "fp64":
        torch.set_default_dtype(torch.float64)
    policy = tiny_policy(precision=precision)
    products = Sampler(policy, byte_tokenizer()).rows.products
    for product in products:
        product.pack()
    packed = sum(4 * weight.numel() for product in products if product.packed for weight in product.weights)
    known = facts(sizes=sizes(policy.model))
    recipes = (config(**RECIPE, precision=precision, device=device) for device in ("cpu", "cuda"))
    on_cpu, on_gpu = (by_holder(recipe, known)["sampling: keys, values, logits, packed weights"] for recipe in recipes)
    assert on_cpu - on_gpu == pytest.approx(packed, rel=0.02)  # it counts biases too, and rows that no token has


def tensors(item) -> list[torch.Tensor]:
    """All tensors in it, in lists, tuples and dicts of any depth."""
    if isinstance(item, torch.Tensor):
        return [item]
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_of_a_token_is_what_autograd_saves(precision, checkpointing):
    """Of a token in a layer: the difference that tokens make, in the difference that layers make."""
    grown, counted = [], []
    for layers in (2, 6):
        policy = tiny_policy("llama", precision, num_hidden_layers=layers)
        if checkpointing:
            policy.train().checkpoint_activations()
        grown.append((saved_bytes(policy, 40) - saved_bytes(policy, 20)) / 20)
        recipe = config(precision=precision, activation_checkpointing=checkpointing)
        counted.append(kept(recipe, facts(sizes=sizes(policy.model))))
    assert grown[1] - grown[0] == pytest.approx(counted[1] - counted[0], rel=0.05)


def saved_bytes(policy, length: int) -> int:
    """What a forward pass over so many tokens keeps for backward, weights left out."""
    with saved.noted() as seen:
        policy(pack([[7] * 10], [[[8] * (length - 10)]]), 1.0)
    return saved.num_bytes(seen, policy)


# The logits of 1,024 rows weigh more than the budget's grain, in a step and in validation.
@pytest.mark.parametrize(("group_size", "eval_every"), [(8, 0), (256, 0), (8, 5)])
def test_auto_fills_the_free_memory_and_not_more(group_size, eval_every):
    changes = {"group_size": group_size, "eval_every": eval_every, "eval_batch": 1024}
    recipe = config(**RECIPE | {"max_tokens_per_microbatch": "auto"} | changes)
    numbers = []
    for free in (20, 24, 28):
        known = replace(KNOWN, free_bytes=free * 10**9)
        numbers.append(budget(recipe, known))
        at_once = least_of(recipe, known, numbers[-1])
        assert at_once <= USED * known.free_bytes < least_of(recipe, known, numbers[-1] + LEAST_TOKENS)
    assert numbers == sorted(numbers) and LEAST_TOKENS < numbers[0] < numbers[-1] < MOST_TOKENS
    assert all(number % LEAST_TOKENS == 0 for number in numbers)
    assert budget(replace(recipe, activation_checkpointing=True), known) > numbers[-1]
    assert budget(recipe, replace(KNOWN, free_bytes=10**9)) == LEAST_TOKENS
    assert budget(recipe, replace(KNOWN, free_bytes=10**12)) == MOST_TOKENS
    assert budget(recipe, replace(known, sizes=replace(SIZES, layers=48))) < numbers[-1]


def least_of(recipe, known, number: int) -> float:
    """Copies, the sampler's cache and graphs, and learning from a micro-batch of so many tokens, all at one time."""
    many = replace(known, solution_tokens=(60,))
    full = replace(recipe, max_tokens_per_microbatch=number, prompts_per_step=10_000)  # so that micro-batches are full
    parts = by_holder(full, many)
    rows = max(4 * recipe.group_size, recipe.eval_batch if recipe.eval_every else 0)
    graphs = 2 * 4 * rows * known.sizes.vocabulary  # logits, and their exponentials
    sampler = cache(recipe, known, 20, validating=True) + graphs
    return exact(parts) + sampler + parts["learning: activations, logits"]


def test_activation_checkpointing_keeps_less():
    plain, less = (peak(by_holder(config(**RECIPE, activation_checkpointing=on), KNOWN)) for on in (False, True))
    assert less < plain


def test_seconds_follow_the_operations():
    def learn(**changes):
        return seconds(config(**RECIPE | {"num_epochs": 1} | changes), KNOWN, flops=1e9, bandwidth=1e30)["learn"]

    once = 2 * 500_000_000 * 1840 / 0.5e9  # a forward pass: two operations a weight and token, at half the speed
    assert learn() == pytest.approx(3 * once, rel=0.01)
    assert learn(kl_coef=0.1) == pytest.approx(4 * once, rel=0.01)
    assert learn(num_epochs=2) == pytest.approx(7 * once, rel=0.01)
    assert learn(activation_checkpointing=True) == pytest.approx(4 * once, rel=0.01)


def test_this_machine_can_be_measured():
    import torch

    assert all(speed > 1e6 for speed in measured(torch.device("cpu"), "fp32"))
