"""The decoder against transformers' own models, with the configs of real checkpoints: numbers, gradients, tokens."""

import copy
from contextlib import nullcontext

import pytest
import torch

from grpo.batch import Batch
from grpo.policy import Policy, load_policy, token_logprobs
from grpo.policy.decoder import CausalLM
from grpo.policy.weights import JOINT
from grpo.sampler import Sampler
from grpo.tree import pack
from tests.fakes.families import CHECKPOINTS
from tests.fakes.models import byte_tokenizer, in_float64, plain_logprobs, tiny_model

PROMPTS = [[5, 6, 7, 8], [5, 6, 9]]
COMPLETIONS = [[[1, 2, 3], [1, 2, 4, 4]], [[10, 11], [12, 13, 14]]]
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}
every_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)


def pair(name, precision="fp64"):
    """A policy, and transformers' own model with weights of its own that are the same."""
    family, changes = CHECKPOINTS[name]
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = tiny_model(family, vocab_size=257, dtype=dtype, **changes)
    policy = Policy(copy.deepcopy(model), byte_tokenizer(), precision)
    assert isinstance(policy.model, CausalLM)
    return policy, model


def exactly(precision):
    """transformers computes norms and angles in float32 whatever the dtype, but for this context."""
    return in_float64() if precision == "fp64" else nullcontext()


def gradients_by_name(model):
    """{name in the files: gradient}; joint matrices of a file are put together from ours."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    if isinstance(model, CausalLM) and model.model.spec.joint:
        for joint, parts in JOINT.items():
            for name in [name for name in found if f"{parts[0]}.weight" in name]:
                pieces = [found.pop(name.replace(parts[0], part)) for part in parts]
                found[name.replace(parts[0], joint)] = torch.cat(pieces)
    return found


@every_checkpoint
@pytest.mark.parametrize("precision", TOLERANCE)
def test_logprobs_and_gradients_are_those_of_transformers(name, precision):
    policy, model = pair(name, precision)
    tree, near = pack(PROMPTS, COMPLETIONS), TOLERANCE[precision]
    ours, entropy = policy(tree, 0.7)
    with exactly(precision):
        theirs, their_entropy = plain_logprobs(model, PROMPTS, COMPLETIONS, 0.7, 257, 4)
    torch.testing.assert_close(ours, theirs[tree.row, tree.column], rtol=near, atol=near)
    torch.testing.assert_close(entropy, their_entropy[tree.row, tree.column], rtol=near, atol=near)
    weights = torch.linspace(-1, 1, len(ours), dtype=ours.dtype)
    (weights * ours).sum().backward()
    (weights * theirs[tree.row, tree.column]).sum().backward()
    found, expected = gradients_by_name(policy.model), gradients_by_name(model)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[parameter], gradient, rtol=near, atol=near * scale, msg=parameter)


@every_checkpoint
def test_greedy_decoding_is_that_of_transformers_token_for_token(name):
    policy, model = pair(name)
    options = {"group_size": 1, "max_new_tokens": 12, "temperature": 0.0, "seed": 0, "step": 1}
    sampler = Sampler(policy, byte_tokenizer())
    sampler.is_eos[:] = False
    ours = sampler.generate(PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        with in_float64():
            theirs = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert ours.completion_ids[row].tolist() == theirs[0, len(prompt) :].tolist()


@every_checkpoint
def test_the_sampler_sees_what_the_learner_sees(name):
    policy, _ = pair(name)
    sampler = Sampler(policy, byte_tokenizer())
    options = {"group_size": 3, "max_new_tokens": 9, "temperature": 0.8, "seed": 0, "step": 1}
    drawn = sampler.generate(PROMPTS, **options)
    batch = Batch(PROMPTS, drawn.completion_ids, drawn.completion_mask)
    logprobs, _ = token_logprobs(policy, batch, 0.8)
    torch.testing.assert_close(logprobs.detach(), drawn.sampling_logprobs, rtol=1e-9, atol=1e-9)


@every_checkpoint
def test_recomputed_activations_give_the_same_gradients(name):
    policy, _ = pair(name)
    again = copy.deepcopy(policy)
    again.checkpoint_activations()
    for each in (policy, again):
        each(pack(PROMPTS, COMPLETIONS), 1.0)[0].sum().backward()
    for ours, theirs in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_embedded_model_is_computed_by_the_decoder():
    assert load_policy("embedded")[0].is_decoder
