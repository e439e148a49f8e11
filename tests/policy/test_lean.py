"""Lean forwards against those of transformers: the same numbers and gradients, fewer bytes kept."""

from contextlib import nullcontext

import pytest
import torch
from transformers.models.llama import modeling_llama

from grpo.policy import lean
from grpo.policy.lean import keep_less, norms_made_again
from tests.fakes import saved
from tests.fakes.models import FAMILIES, keep_float64, tiny_model


def forward(model):
    """The mean square of the logits of a fixed input."""
    return model(input_ids=torch.arange(40)[None], use_cache=False).logits.square().mean()


def gradients(model, around=nullcontext):
    """The same and its gradients, with the forward pass inside `around()`."""
    with around():
        value = forward(model)
    return value, torch.autograd.grad(value, list(model.parameters()))


def kept_bytes(model, around=nullcontext):
    """What the forward pass keeps for backward."""
    with saved.noted() as seen, around():
        forward(model)
    return saved.num_bytes(seen, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_transformers(family):
    ours, theirs = (tiny_model(family, dtype=torch.float64) for _ in range(2))
    for model in (ours, theirs):
        keep_float64(model)
    keep_less(ours)
    forwards = [(type(m).__name__, vars(m).get("forward")) for m in ours.modules()]
    replaced = [name for name, forward in forwards if getattr(forward, "__module__", "") == "grpo.policy.lean"]
    assert sum(name.endswith("MLP") for name in replaced) == 2
    assert sum(name.endswith("Attention") for name in replaced) == 2
    assert sum(name.endswith("RMSNorm") for name in replaced) >= 5
    (value, grads), (expected, expected_grads) = gradients(ours), gradients(theirs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours_grad, their_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-9, atol=1e-9)


def test_less_is_kept_for_backward():
    ours, theirs = tiny_model("llama", intermediate_size=96), tiny_model("llama", intermediate_size=96)
    keep_less(ours)
    assert kept_bytes(ours) < 0.75 * kept_bytes(theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_norms_give_out_is_made_again_to_the_bit(family, monkeypatch):
    model, made = tiny_model(family), []
    keep_less(model)
    output = lean._Source.output
    monkeypatch.setattr(lean._Source, "output", lambda source: made.append(source) or output(source))
    plain, plain_gradients = gradients(model)
    forward_alone = len(made)
    made.clear()
    value, made_gradients = gradients(model, norms_made_again)
    assert torch.equal(value, plain)
    assert all(map(torch.equal, made_gradients, plain_gradients))
    assert len(made) == forward_alone + 2 * 2 + 1, "once for all layers that read it: two in a layer, one for the head"


def test_what_norms_give_out_is_not_kept():
    model = tiny_model("llama")
    keep_less(model)
    less = kept_bytes(model) - kept_bytes(model, norms_made_again)
    assert less == 5 * 40 * 32 * 4, "five norms, 40 tokens of width 32 in float32"


def test_part_of_a_norms_output_is_kept_as_it_is():
    norm, layer = tiny_model("llama").model.norm, torch.nn.Linear(32, 3)
    keep_less(norm)
    x = torch.randn(1, 6, 32)
    wanted = torch.autograd.grad(layer(norm(x)[:, 1:4]).sum(), [layer.weight, norm.weight])
    with norms_made_again():
        value = layer(norm(x)[:, 1:4]).sum()
    assert all(map(torch.equal, torch.autograd.grad(value, [layer.weight, norm.weight]), wanted))


def test_a_second_derivative_is_refused_and_never_wrong():
    model = tiny_model("llama")
    keep_less(model)
    with norms_made_again():
        value = forward(model)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()


def replaced_attention(model):
    keep_less(model)
    return ["forward" in vars(layer.self_attn) for layer in model.model.layers]


def test_attention_with_a_window_is_left_alone():
    assert replaced_attention(tiny_model("mistral", sliding_window=8)) == [False, False]


def test_attention_that_rotates_other_pairs_is_left_alone(monkeypatch):
    def neighbours(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    assert replaced_attention(tiny_model("llama")) == [True, True]
    monkeypatch.setattr(modeling_llama, "rotate_half", neighbours)
    assert replaced_attention(tiny_model("llama")) == [False, False]


def test_an_mlp_with_biases_is_left_alone():
    model = tiny_model("llama", mlp_bias=True)
    keep_less(model)
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


def test_a_cache_of_transformers_still_works():
    ours, theirs = tiny_model("qwen3"), tiny_model("qwen3")
    keep_less(ours)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = torch.arange(5)[None]
    assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))


def test_another_form_is_left_alone():
    model = tiny_model("gemma")  # its norm multiplies by 1 + weight, its MLP is not silu
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    keep_less(model)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == before


class Probed(torch.nn.Module):
    """An MLP that says that it is of Llama's form, and may do something more."""

    def __init__(self, more: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = (torch.nn.Linear(8, 16, bias=False) for _ in range(2))
        self.down_proj, self.act_fn, self.more = torch.nn.Linear(16, 8, bias=False), torch.nn.SiLU(), more
        if more == "a bias that is now 0":
            self.bias = torch.nn.Parameter(torch.zeros(8))

    def forward(self, x):
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.more == "a norm":
            gated = torch.nn.functional.rms_norm(gated, (16,))
        if self.more == "a bound":
            gated = gated.clamp(max=50)
        if self.more == f"a factor in {'train' if self.training else 'eval'} mode":
            gated = gated * 1.1
        return self.down_proj(gated) + getattr(self, "bias", 0)


MORE = ("a norm", "a bound", "a factor in train mode", "a factor in eval mode", "a bias that is now 0")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("more", ["", *MORE])
def test_c47_an_mlp_is_replaced_for_its_numbers_and_not_for_its_names(more, training):
    """The kind: a forward that is replaced because a module looks like another; it has to give the same numbers."""
    module = Probed(more).train(training)
    keep_less(module)
    assert ("forward" in vars(module)) == (not more)
    assert module.training == training == module.act_fn.training


def test_c47_a_norm_and_attention_with_a_further_weight_are_left_alone():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    for module in (layer.self_attn, layer.input_layernorm):
        module.register_parameter("shift", torch.nn.Parameter(torch.zeros(1)))
    keep_less(model)
    assert ["forward" in vars(module) for module in (layer.self_attn, layer.input_layernorm)] == [False, False]
    assert "forward" in vars(layer.mlp) and "forward" in vars(layer.post_attention_layernorm)
