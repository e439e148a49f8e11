"""Forwards that keep float64 against those of transformers, and against the formula."""

import pytest
import torch

from grpo.policy.float64 import keep_float64
from tests.fakes.models import FAMILIES, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forwards_equal_those_of_transformers_and_keep_the_dtype(dtype):
    positions = torch.tensor([[0, 1, 2, 500]])
    for family in FAMILIES:
        ours, theirs = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype)
        keep_float64(ours)
        x = torch.randn(1, 4, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours.model.norm(x), theirs.model.norm(x), rtol=1e-6, atol=1e-6)
        pairs = zip(ours.model.rotary_emb(x, positions), theirs.model.rotary_emb(x, positions), strict=True)
        for our, their in pairs:
            assert our.dtype == dtype
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * ours.model.norm.weight.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.model.norm(x).double(), exact, rtol=8 * eps, atol=8 * eps)


def test_norms_of_another_form_are_refused():
    with pytest.raises(ValueError, match="precision: fp64 does not support GemmaRMSNorm"):
        keep_float64(tiny_model("gemma", dtype=torch.float64))
