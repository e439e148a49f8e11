"""Leaner forwards of the Llama family: less is kept for backward, and fewer tensors come and go.

Of what a layer keeps per token, nearly half can be had again for a few elementwise operations: what goes on inside a
norm, what a norm gives out, and the product of an MLP's gate and its other half. On a CPU memory that is new costs as
much as what is written there, so MLPs and the rotation of positions make do with few tensors; products are those of
`onednn.py`. Left out: matrix products made again in backward, which is activation checkpointing; anything under
autocast, where transformers' forwards stay.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grpo.kernels.onednn import linear, multiply
from grpo.policy.attention import attention_interface

GATED = ("gate_proj", "up_proj", "down_proj")
ROTATED = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
"""Attention of transformers that projects, normalizes heads (Qwen3), rotates both halves and attends, no more."""


def keep_less(model: nn.Module) -> None:
    """Replace the forwards of norms, MLPs and attention that are of Llama's form; what is of another form stays."""
    for module in model.modules():
        if _is_norm(module):
            module.forward = MethodType(norm_forward, module)
        elif _is_plain_mlp(module):
            module.forward = MethodType(_gated_forward, module)
        elif _is_rotated(module):
            module.forward = MethodType(_attention_forward, module)


def _is_norm(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    weight = module.weight
    if weight.is_meta:
        return False
    x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)
    return _has_only(module, ("weight",)) and _same(module, norm_forward, x)


def _is_plain_mlp(module: nn.Module) -> bool:
    """Whether it is what `is_gated` says, by its numbers: names do not show a norm or a factor between the products."""
    if not is_gated(module) or module.gate_proj.weight.is_meta or not _has_only(module, [f"{x}.weight" for x in GATED]):
        return False
    weight = module.gate_proj.weight
    x = torch.linspace(-1, 2, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(1, 3, -1)
    return _same(module, _gated_forward, x * x.new_tensor([0.01, 1, 100])[:, None])  # bounds show on large inputs alone


def _has_only(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether it has no weight beside these: one that is now 0 would show in no number, and be trained."""
    return {name for name, _ in (*module.named_parameters(), *module.named_buffers())} <= set(names)


@torch.no_grad()
def _same(module: nn.Module, ours: Callable[..., Any], *inputs: Tensor, **named: object) -> bool:
    """Whether `ours` gives what the module's own forward gives, row by row, in train mode and in eval mode."""
    modes = {part: part.training for part in module.modules()}
    got, same = ours(module, *inputs, **named), True
    for mode in (True, False):
        expected, found = (x[0] if isinstance(x, tuple) else x for x in (module.train(mode)(*inputs, **named), got))
        off, size = ((x.abs().amax(-1)) for x in (found - expected, expected))
        same = same and bool((off <= 1e-4 * size).all())
    for part, training in modes.items():
        part.training = training
    return same


def is_gated(module: nn.Module) -> bool:
    """Whether it says that it is an MLP of Llama's form, of plain linear layers without biases."""
    parts = [getattr(module, name, None) for name in GATED]
    activation = type(getattr(module, "act_fn", None)).__name__
    plain = all(type(part) is nn.Linear and part.bias is None for part in parts)
    return plain and activation.startswith("SiLU")


def rotates(module: nn.Module) -> bool:
    """Whether it says that it is attention of Llama's form. With a sliding window it stays with transformers' forward,
    which hands the window on, to be refused."""
    return type(module).__name__ in ROTATED and getattr(module.config, "sliding_window", None) is None


def probe(attention: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Some input of attention, to compare forwards: [1,3,D], and the cosines and sines of 3 positions [1,3,d]."""
    options = {"dtype": dtype, "device": attention.q_proj.weight.device}
    x = torch.linspace(-1, 2, 3 * attention.q_proj.in_features, **options).view(1, 3, -1)
    angles = torch.linspace(0, 3, 3 * attention.head_dim // 2, **options).view(1, 3, -1).repeat(1, 1, 2)
    return x, angles.cos(), angles.sin()


def _is_rotated(module: nn.Module) -> bool:
    if not rotates(module) or module.q_proj.weight.is_meta:
        return False
    x, cos, sin = probe(module, module.q_proj.weight.dtype)
    parts = [f"{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")]
    inputs = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": None}
    return _has_only(module, [*parts, "q_norm.weight", "k_norm.weight"]) and _same(module, _attention_forward, **inputs)


def norm_forward(module: nn.Module, hidden: Tensor) -> Tensor:
    """[..,D] -> [..,D]: x / rms(x) * weight, in float32 or wider."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    arguments = wide, module.weight, module.variance_epsilon
    if not torch.is_grad_enabled():  # for a few rows, what autograd does around a function takes longer than the norm
        return _normalize(*arguments)[0].to(hidden.dtype)
    normalized, inverse = _Norm.apply(*arguments)
    if not torch.compiler.is_compiling():
        normalized.made_of = _Source(wide.detach(), inverse, module.weight.detach())
    return normalized.to(hidden.dtype)


class _Source(NamedTuple):
    """What the output of a norm is made of: x [..,D], 1 / r [..,1], weight [D]."""

    x: Tensor
    inverse: Tensor
    weight: Tensor

    def output(self) -> Tensor:
        """[..,D], the same bits whenever it is made."""
        return self.x.mul(self.inverse).mul_(self.weight)


@contextmanager
def norms_made_again() -> Iterator[None]:
    """Within it, layers that read a norm's output keep for backward what it is made of, which the norm keeps anyway.

    The layers that read the same output ask for it one after another: it is made once, and held until the next.
    """
    latest: dict[str, object] = {}

    def pack(tensor: Tensor) -> Tensor | tuple[_Source, torch.Size]:
        whole = tensor if tensor._base is None else tensor._base
        source = getattr(whole, "made_of", None)
        same_order = source is not None and tensor.is_contiguous() and tensor.numel() == source.x.numel()
        return (source, tensor.shape) if same_order else tensor

    def unpack(packed: Tensor | tuple[_Source, torch.Size]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        source, shape = packed
        if latest.get("source") is not source:
            latest.clear()  # first, so that its memory can be taken again
            latest.update(source=source, output=source.output())
        return latest["output"].view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..,D], [D] -> x / r * weight [..,D] and 1 / r [..,1], with r = sqrt(mean x^2 + eps)."""
    inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return _Source(x, inverse, weight).output(), inverse


def _gated_forward(module: nn.Module, x: Tensor) -> Tensor:
    """[..,D] -> [..,D]: down(silu(gate(x)) * up(x))."""
    if torch.is_grad_enabled():
        return _GatedMLP.apply(x, *(getattr(module, name).weight for name in GATED))
    gate, up, down = (getattr(module, name).weight for name in GATED)
    gate, up = multiply(x, gate), multiply(x, up)
    return multiply(F.silu(gate, inplace=True).mul_(up), down)


def _attention_forward(
    module: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: object,
) -> tuple[Tensor, None]:
    """[1,S,D] -> [1,S,D]: as transformers writes it, but for the rotation of positions."""
    heads = []
    for name in "qkv":
        x = linear(getattr(module, f"{name}_proj"), hidden_states).unflatten(-1, (-1, module.head_dim))
        norm = getattr(module, f"{name}_norm", None)
        heads.append((x if norm is None else norm(x)).transpose(1, 2))
    cos, sin = (x[:, None] for x in position_embeddings)
    rotate = _Rotation.apply if torch.is_grad_enabled() else rotated
    query, key, value = rotate(heads[0], cos, sin), rotate(heads[1], cos, sin), heads[2]
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    out, _ = attention_interface(module, query, key, value, attention_mask, scaling=module.scaling, **options)
    return linear(module.o_proj, out.flatten(-2)), None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..,d] -> [..,d]: each pair (x_i, x_{i + d/2}) turned by its angle; cos and sin [..,d] have equal halves."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class _Rotation(torch.autograd.Function):
    """y = R x and dx = R^T dy: the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return rotated(dy, cos, -sin), None, None


class _Norm(torch.autograd.Function):
    """y = w x / r and 1 / r, which keeps x and 1 / r alone.

    With n = x / r and g = w dy: dx = (g - n mean(g n)) / r and dw = sum dy n.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, inverse = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return y, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, _: Tensor):
        x, weight, inverse = ctx.saved_tensors
        n, g = x * inverse, dy * weight
        d_weight = (dy * n).flatten(0, -2).sum(0)
        dx = g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(inverse)
        return dx, d_weight, None


class _GatedMLP(torch.autograd.Function):
    """y = (silu(a) * b) W^T with a = x A^T and b = x B^T, which keeps x, a and b alone.

    Two tensors of the size of a are made in backward, and used for all that has their size.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
        gate, up = multiply(x, gate_weight), multiply(x, up_weight)
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        return multiply(F.silu(gate).mul_(up), down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        x_rows, dy_rows, gate, up = (rows.flatten(0, -2) for rows in (x, dy, gate, up))
        activated = F.silu(gate)
        gated = activated * up
        d_down = dy_rows.t() @ gated
        del gated  # so that its memory can be taken again
        d_gated = multiply(dy_rows, down_weight.t())
        d_up = activated.mul_(d_gated)
        d_gate = torch.ops.aten.silu_backward(d_gated.mul_(up), gate, grad_input=d_gated)
        dx = multiply(d_up, up_weight.t(), added=multiply(d_gate, gate_weight.t()))
        return dx.view(x.shape), d_gate.t() @ x_rows, d_up.t() @ x_rows, d_down
