"""Lean forwards against those of transformers: the same numbers and gradients, fewer bytes kept."""

import pytest
import torch

from grpo.lean import keep_less
from tests.models import FAMILIES, keep_float64, tiny_model


def gradients(model, kept=None):
    """The sum of squares of the logits of a fixed input, its gradients, and into `kept` the storages kept for them."""

    def keep(tensor):
        if kept is not None:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = model(input_ids=torch.arange(40)[None], use_cache=False).logits.square().mean()
    return value, torch.autograd.grad(value, list(model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_transformers(family):
    ours, theirs = (tiny_model(family, dtype=torch.float64) for _ in range(2))
    for model in (ours, theirs):
        keep_float64(model)
    keep_less(ours)
    forwards = [(type(m).__name__, vars(m).get("forward")) for m in ours.modules()]
    replaced = [name for name, forward in forwards if getattr(forward, "__module__", "") == "grpo.lean"]
    assert sum(name.endswith("MLP") for name in replaced) == 2
    assert sum(name.endswith("RMSNorm") for name in replaced) >= 5
    (value, grads), (expected, expected_grads) = gradients(ours), gradients(theirs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours_grad, their_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-9, atol=1e-9)


def test_less_is_kept_for_backward():
    ours, theirs = tiny_model("llama", intermediate_size=96), tiny_model("llama", intermediate_size=96)
    keep_less(ours)
    kept, kept_by_theirs = {}, {}
    gradients(ours, kept), gradients(theirs, kept_by_theirs)
    weights = sum(p.nbytes for p in theirs.parameters())
    assert sum(kept.values()) - weights < 0.75 * (sum(kept_by_theirs.values()) - weights)


def test_another_form_is_left_alone():
    model = tiny_model("gemma")  # its norm multiplies by 1 + weight, its MLP is not silu
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    keep_less(model)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == before
