"""The frozen copy: the numbers of the policy that it was made of, to the bit, whatever becomes of that."""

import pytest
import torch

from grpo.policy import frozen_copy, mix_in, token_logprobs
from tests.fakes.models import tiny_policy
from tests.policy.test_model import make_batch


@pytest.mark.usefixtures("weights_for_onednn")
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma"])  # tied, not tied, of transformers
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_c22_kl_is_exactly_zero_at_step_0(precision, family):
    policy = tiny_policy(family, precision, tie_word_embeddings=family != "phi3").train()
    reference = frozen_copy(policy)
    batch = make_batch()
    expected, _ = token_logprobs(reference, batch, 1.0)
    assert torch.equal(token_logprobs(policy, batch, 1.0)[0], expected)
    with torch.no_grad():
        assert torch.equal(token_logprobs(policy, batch, 1.0)[0], expected)
        assert torch.equal(token_logprobs(reference, batch, 1.0)[0], expected)


def test_c23_the_reference_is_the_initial_policy_and_frozen():
    policy = tiny_policy()
    reference = frozen_copy(policy)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    initial, _ = token_logprobs(policy, make_batch(), 1.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert torch.equal(token_logprobs(reference, make_batch(), 1.0)[0], initial)
    assert not torch.equal(token_logprobs(policy, make_batch(), 1.0)[0], initial)


def test_c26_only_what_autocast_rounds_anyway_is_stored_rounded():
    for tied in (True, False):
        policy = tiny_policy("qwen3", "bf16", tie_word_embeddings=tied)
        for name, parameter in frozen_copy(policy).model.named_parameters():
            assert parameter.dtype == (torch.bfloat16 if "_proj" in name else torch.float32), name
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in frozen_copy(tiny_policy()).parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_renewed_reference_is_a_new_copy_of_the_policy_or_lies_between(precision):
    policy, other = tiny_policy(precision=precision), tiny_policy(precision=precision, seed=1)
    reference, copy = frozen_copy(policy), frozen_copy(other)
    before = [p.clone() for p in reference.parameters()]
    mix_in(reference, other, 0.25)
    for mixed, old, new in zip(reference.parameters(), before, other.parameters(), strict=True):
        expected = 0.25 * new.detach() + 0.75 * old.float()
        torch.testing.assert_close(mixed, expected.to(mixed.dtype))
        assert not mixed.requires_grad
    mix_in(reference, other, 1.0)
    assert all(map(torch.equal, reference.parameters(), copy.parameters()))
