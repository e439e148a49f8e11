"""Forwards that keep less for backward: norms and gated MLPs whose intermediate values are computed again, not kept.

Of what a layer of the Llama family keeps per token, nearly half can be had again for a few elementwise operations:
what goes on inside a norm, what a norm gives out, and the product of an MLP's gate and its other half. Left out: matrix
products, which activation checkpointing computes again; anything under autocast, where transformers' forwards stay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.is_grad_enabled():
        return _GatedDown.apply(gate, up, module.down_proj.weight)
    return module.down_proj(F.silu(gate, inplace=True).mul_(up))


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


class _GatedDown(torch.autograd.Function):
    """y = (silu(a) b) W^T, which keeps a and b alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        gated = activated * up
        d_weight = dy.flatten(0, -2).t() @ gated.flatten(0, -2)
        d_gated = torch.matmul(dy, weight, out=gated)  # gated itself is used up
        d_up = activated.mul_(d_gated)
        d_gate = torch.ops.aten.silu_backward(d_gated.mul_(up), gate, grad_input=d_gated)
        return d_gate, d_up, d_weight
