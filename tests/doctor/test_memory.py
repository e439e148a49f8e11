"""Bytes of a step, worked out by hand for a model of round numbers, and held to what really lies in memory."""

from dataclasses import replace

import pytest
import torch

from grpo.doctor import memory
from grpo.doctor.facts import sizes
from grpo.doctor.memory import LEAST_TOKENS, MOST_TOKENS, USED, budget, copies, estimate, kept, least, places
from grpo.policy import add_adapters, trained
from grpo.sampler import Sampler
from grpo.sampler.cache import DecodeAttention
from grpo.tree import pack
from tests.fakes import saved
from tests.fakes.known_facts import SIZES, config, facts
from tests.fakes.models import byte_tokenizer, tiny_policy

# 40 prompts of 90 to 100 tokens, 80 of them common, 4 prompts x 8 completions of up to 60 tokens
RECIPE = {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 60, "max_tokens_per_microbatch": 1000}
KNOWN = facts(prompt_tokens=(90, *(100,) * 39), shared_tokens=80)
KEYS = 2 * 24 * 128
"""Numbers that keys and values of a token have in all layers."""


@pytest.mark.parametrize(("changes", "updates"), [({}, 1), ({"num_epochs": 2}, 2), ({"minibatch_size": 24}, 2)])
def test_updates_per_step(changes, updates):
    assert memory.updates_per_step(config(**RECIPE | {"num_epochs": 1} | changes)) == updates


def held(**changes) -> float:
    return sum(copies(config(**RECIPE | changes), KNOWN).values())


def test_what_is_as_large_as_the_model_is_four_floats_a_weight_and_the_copies():
    copy = 2 * 350_000_000 + 4 * 150_000_000  # linear layers in bfloat16, the rest in float32
    head = 2 * SIZES.vocabulary * SIZES.width  # rounded for sampling on a GPU
    assert held(kl_coef=0.1) == 16 * 500_000_000 + copy + copy + head
    assert held(kl_coef=0.1, device="cpu") == 16 * 500_000_000 + copy + copy
    assert held(precision="fp32") == 16 * 500_000_000
    assert held(precision="fp64") == 32 * 500_000_000
    assert held(lag=1) == held() and held(precision="fp32", lag=1) == 20 * 500_000_000
    two = copies(config(**RECIPE), replace(KNOWN, world_size=2))
    assert two["gradient, summed over processes"] == 4 * 500_000_000


def test_adapters_have_gradient_and_moments_alone_and_share_what_is_not_linear():
    rank = {"lora_rank": 10, "kl_coef": 0.1}
    learned, others, head = 10 * SIZES.adapted, 4 * 150_000_000, 2 * SIZES.vocabulary * SIZES.width
    whole = others + 2 * 2 * 350_000_000 + head  # in bfloat16 the policy's linear layers and the sampler's
    assert held(**rank) == 16 * learned + whole
    assert held(**rank, optimizer="muon") == 12 * learned + whole
    assert held(**rank, precision="fp16") == 16 * learned + whole + 2 * 350_000_000  # the files are in bfloat16
    assert held(**rank, precision="fp32") == 16 * learned + others + 2 * 4 * 350_000_000
    two = copies(config(**RECIPE | rank), replace(KNOWN, world_size=2))
    assert two["gradient, summed over processes"] == 4 * learned
    assert least(config(**RECIPE | rank), KNOWN).learning == 4 * learned
    fixed = [estimate(config(**RECIPE | {"lora_rank": r}), KNOWN) for r in (0, 1)]
    fewer = 2 * 350_000_000 + 4 * SIZES.vocabulary * SIZES.width - 1000 * 26 * 7 * 2  # not rounded again; no gradient
    frozen_norms = 1000 * 26 * 2 * 4 * SIZES.width  # keep their input alone; 24 layers, and 2 of working memory
    assert fixed[0].learning - fixed[1].learning == fewer + frozen_norms


def test_shards_divide_what_is_held_but_not_the_sampler_s_copy():
    copy = 2 * 350_000_000 + 4 * 150_000_000
    eight, table = replace(KNOWN, world_size=8, nearby=4), SIZES.vocabulary * SIZES.width
    for how, parts in (("full", 8), ("hybrid", 4)):
        found = copies(config(**RECIPE, shard=how, kl_coef=0.1), eight)
        assert found["weights, gradient, moments"] == 16 * 500_000_000 / parts
        assert found["reference"] == copy / parts and found["sampler's copy"] == copy + 2 * table
        assert found["gradient, summed over processes"] == 0
    assert copies(config(**RECIPE, shard="full", precision="fp32"), eight)["sampler's copy"] == 4 * 500_000_000
    assert copies(config(**RECIPE, shard="full"), KNOWN) == copies(config(**RECIPE), KNOWN)  # one process
    divided = config(**RECIPE, shard="full")
    assert least(divided, eight).learning == 4 * 500_000_000 / 8
    known = {"embedding and head, gathered": 3 * 4 * table, "layers, gathered": 4 * 4 * 350_000_000 / 24}
    assert memory.gathered(divided, eight) == known and memory.gathered(config(**RECIPE), eight) == {}
    untied = replace(eight, sizes=replace(SIZES, parameters=350_000_000 + 2 * table))
    assert memory.gathered(divided, untied)["embedding and head, gathered"] == 4 * 4 * table
    frozen = {"embedding and head, gathered": 4 * table, "layers, gathered": 2 * 2 * 350_000_000 / 24}
    assert memory.gathered(replace(divided, lora_rank=8), eight) == frozen
    grown = estimate(divided, eight).learning - estimate(config(**RECIPE), eight).learning
    assert grown == pytest.approx(sum(known.values()))
    again = estimate(replace(divided, activation_checkpointing=True), eight)
    fewer = estimate(divided, eight).learning - again.learning
    assert fewer > 2 * 350_000_000 * 23 / 24  # rounded weights are then those of a layer


def test_sizes_of_adapters_are_counted_from_the_layers():
    policy, targets = tiny_policy(), ("q_proj", "down_proj")
    for chosen in ("all", targets):
        adapted = tiny_policy()
        add_adapters(adapted, 3, 6.0, chosen, seed=0)
        counted = sum(p.numel() for p in trained(adapted).parameters())
        assert memory.trained(config(lora_rank=3), facts(sizes=sizes(policy.model, chosen))) == counted


def test_the_cache_is_the_trunk_once_a_branch_per_prompt_and_own_tokens_per_row():
    recipe = config(**RECIPE, eval_every=5)
    assert places(recipe, KNOWN, 20) == 80 + 4 * 20 + 32 * 60
    assert places(recipe, replace(KNOWN, world_size=3), 20) == 80 + 2 * 20 + 16 * 60
    assert places(recipe, KNOWN, 20, batch=10) == 80 + 10 * 20 + 32 * 60
    assert places(recipe, KNOWN, 20, batch=40) == 80 + 40 * 20 + 40 * 60


def test_what_a_step_surely_needs():
    """Weights, two moments and copies all the time; then in turn the sampler's cache and the gradient."""
    surely = least(config(**RECIPE), KNOWN)
    assert surely.held == held() - 4 * 500_000_000 and surely.learning == 4 * 500_000_000
    assert surely.sampling == 2 * KEYS * (80 + 4 * 10 + 32 * 60)  # the shortest prompt has 10 tokens of its own
    assert surely.peak == surely.held + surely.learning
    assert least(config(**RECIPE, precision="fp32"), KNOWN).sampling == 2 * surely.sampling
    assert least(config(**RECIPE), replace(KNOWN, sharing=3)).peak == 3 * surely.peak


def test_what_a_step_may_need():
    recipe = config(**RECIPE)
    needed = estimate(recipe, KNOWN)
    assert needed.held == held() and needed.learning > 1000 * kept(recipe, KNOWN)
    assert needed.sampling == 4 * (KEYS * (80 + 4 * 20 + 32 * 60) + 2 * 32 * SIZES.vocabulary)
    small = config(**RECIPE | {"max_tokens_per_microbatch": 10_000})  # the step has 2,080 tokens
    assert estimate(small, KNOWN).learning - needed.learning == 1080 * kept(recipe, KNOWN)
    assert estimate(replace(recipe, activation_checkpointing=True), KNOWN).peak < needed.peak
    assert estimate(recipe, replace(KNOWN, sharing=3)).peak == 3 * needed.peak


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_the_cache_is_what_the_sampler_holds(precision, monkeypatch):
    """Every tensor with a head's width that the attention holds when the first token of its own has been drawn."""
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [5, 6, 7, 30, 31, 32]]  # 3 common, at most 3 own
    policy = tiny_policy(precision=precision)
    seen, begin = [], DecodeAttention.begin

    def look(attention):
        if not seen:
            found = tensors(vars(attention))
            seen.append(sum(t.numel() * t.element_size() for t in found if t.is_floating_point() and t.shape[-1] == 8))
        begin(attention)

    monkeypatch.setattr(DecodeAttention, "begin", look)
    if precision == "fp64":
        torch.set_default_dtype(torch.float64)
    sampler = Sampler(policy, byte_tokenizer())
    sampler.generate(prompts, group_size=2, max_new_tokens=5, temperature=1.0, seed=0, step=1)
    recipe = config(prompts_per_step=3, group_size=2, max_new_tokens=5, precision=precision)
    known = facts(sizes=sizes(policy.model), prompt_tokens=(4, 5, 6), shared_tokens=3)
    logits = 2 * 6 * known.sizes.vocabulary
    number = 8 if precision == "fp64" else 4
    assert seen[0] + number * logits == memory.sampler_buffers(recipe, known)


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
    on_cpu, on_gpu = (estimate(recipe, known).sampling for recipe in recipes)
    assert on_cpu - on_gpu == pytest.approx(packed, rel=0.02)  # it counts biases too, and rows that no token has


def tensors(item) -> list[torch.Tensor]:
    """All tensors in it, in lists, tuples and dicts of any depth."""
    if isinstance(item, torch.Tensor):
        return [item]
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_of_a_token_is_what_autograd_saves(precision, checkpointing, lora_rank):
    """Of a token in a layer: the difference that tokens make, in the difference that layers make."""
    grown, counted = [], []
    for layers in (2, 6):
        policy = tiny_policy("llama", precision, num_hidden_layers=layers)
        add_adapters(policy, lora_rank, 8.0, "all", seed=0)
        if checkpointing:
            policy.train().checkpoint_activations()
        grown.append((saved_bytes(policy, 40) - saved_bytes(policy, 20)) / 20)
        recipe = config(precision=precision, activation_checkpointing=checkpointing, lora_rank=lora_rank)
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
        assert at_once(recipe, known, numbers[-1]) <= USED["cuda"] * known.free_bytes
        assert at_once(recipe, known, numbers[-1] + LEAST_TOKENS) > USED["cuda"] * known.free_bytes
    assert numbers == sorted(numbers) and LEAST_TOKENS < numbers[0] < numbers[-1] < MOST_TOKENS
    assert all(number % LEAST_TOKENS == 0 for number in numbers)
    assert budget(replace(recipe, activation_checkpointing=True), known) > numbers[-1]
    assert budget(recipe, replace(KNOWN, free_bytes=10**9)) == LEAST_TOKENS
    assert budget(recipe, replace(KNOWN, free_bytes=10**12)) == MOST_TOKENS
    assert budget(recipe, replace(known, sizes=replace(SIZES, layers=48))) < numbers[-1]


def test_on_a_cpu_processes_share_the_memory_and_glibc_keeps_some():
    recipe = config(**RECIPE | {"max_tokens_per_microbatch": "auto", "device": "cpu", "precision": "fp32"})
    alone, shared = replace(KNOWN, free_bytes=30 * 10**9), replace(KNOWN, free_bytes=60 * 10**9, sharing=2)
    number = budget(recipe, alone)
    assert LEAST_TOKENS < number < MOST_TOKENS and number == budget(recipe, shared)
    assert at_once(recipe, alone, number) <= USED["cpu"] * 30 * 10**9 < at_once(recipe, alone, number + LEAST_TOKENS)


def at_once(recipe, known, number: int) -> float:
    """Copies, the sampler's cache and graphs, and learning from a micro-batch of so many tokens, all at one time."""
    full = replace(recipe, max_tokens_per_microbatch=number, prompts_per_step=10_000)  # so that micro-batches are full
    needed = estimate(full, known)
    batch = recipe.eval_batch if recipe.eval_every else 0
    rows = max(4 * recipe.group_size, batch)
    graphs = 2 * rows * known.sizes.vocabulary  # logits, and their exponentials
    return needed.held + needed.learning + 4 * (KEYS * places(recipe, known, 20, batch) + graphs)
