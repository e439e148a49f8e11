"""Forwards that keep less for backward: norms and gated MLPs whose intermediate values are computed again, not kept.

Of what a layer of the Llama family keeps per token, more than a third can be had again for a few elementwise
operations: the normalised input of a norm, and the product of an MLP's gate and its other half. Left out: matrix
products, which activation checkpointing computes again; anything under autocast, where transformers' forwards stay.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def keep_less(model: nn.Module) -> None:
    """Replace the forwards of norms and MLPs that are of Llama's form; what is of another form stays as it is."""
    for module in model.modules():
        if _is_norm(module):
            module.forward = MethodType(_norm_forward, module)
        elif _is_gated(module):
            module.forward = MethodType(_gated_forward, module)


def _is_norm(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    weight = module.weight
    if weight.is_meta:
        return False
    x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        return torch.allclose(module(x), _norm_forward(module, x), atol=1e-5)


def _is_gated(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = type(getattr(module, "act_fn", None)).__name__
    return all(type(part) is nn.Linear for part in parts) and parts[2].bias is None and activation.startswith("SiLU")


def _norm_forward(module: nn.Module, hidden: Tensor) -> Tensor:
    """[..,D] -> [..,D]: x / rms(x) * weight, in float32 or wider."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    arguments = wide, module.weight, module.variance_epsilon
    # For a few rows, what autograd does around a function takes longer than the norm.
    normalized = _Norm.apply(*arguments) if torch.is_grad_enabled() else _normalize(*arguments)[0]
    return normalized.to(hidden.dtype)


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..,D], [D] -> x / r * weight [..,D] and 1 / r [..,1], with r = sqrt(mean x^2 + eps)."""
    inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x.mul(inverse).mul_(weight), inverse


def _gated_forward(module: nn.Module, x: Tensor) -> Tensor:
    """[..,D] -> [..,D]: down(silu(gate(x)) * up(x))."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.is_grad_enabled():
        return _GatedDown.apply(gate, up, module.down_proj.weight)
    return module.down_proj(F.silu(gate, inplace=True).mul_(up))


class _Norm(torch.autograd.Function):
    """y = w x / r, which keeps x and 1 / r alone.

    With n = x / r and g = w dy: dx = (g - n mean(g n)) / r and dw = sum dy n.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, inverse = ctx.saved_tensors
        n, g = x * inverse, dy * weight
        d_weight = (dy * n).flatten(0, -2).sum(0)
        dx = g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(inverse)
        return dx, d_weight, None


class _GatedDown(torch.autograd.Function):
    """y = (silu(a) b) W^T, which keeps a and b alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        gated = activated * up
        d_weight = dy.flatten(0, -2).t() @ gated.flatten(0, -2)
        d_gated = torch.matmul(dy, weight, out=gated)  # gated itself is used up
        d_up = activated.mul_(d_gated)
        d_gate = torch.ops.aten.silu_backward(d_gated.mul_(up), gate, grad_input=d_gated)
        return d_gate, d_up, d_weight
