"""The decoder's operations, written so that learning keeps less and a CPU moves less memory.

Nearly half of what a layer keeps for backward is cheap to compute again: what goes on inside a norm, what a norm gives
out, and the product of the MLP's two halves. `Lean` keeps the input of a norm and computes these again. On a CPU memory
that is new costs as much as what is written there, so the MLP and the rotation of positions also make do with few
tensors. Products are those of `kernels/onednn.py`. Left out: matrix products made again in backward, which is
activation checkpointing; autocast, half precision and `torch.compile`, which use `Plain` operations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grpo.kernels.onednn import linear, multiply
from grpo.policy.decoder import Attention, GatedMLP, Norm, Plain, Rotation


class Lean(Plain):
    """The same numbers as `Plain`, up to rounding. With and without gradient it computes the same bits."""

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """[..,D] -> [..,D]."""
        if torch.is_grad_enabled():
            return _Norm.apply(x, norm.weight, norm.eps)
        return _normed(x, norm.weight, _inverse(x, norm.eps))

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """[S,D] -> [S,E]."""
        return linear(layer, x)

    def products(self, x: Tensor, norm: Norm | None, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """[S,D] -> [S,E1], [S,E2], ..; of the norm's output nothing is kept."""
        if norm is None or any(type(layer) is not nn.Linear for layer in layers):
            x = x if norm is None else self.norm(norm, x)
            return [linear(layer, x) for layer in layers]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        if torch.is_grad_enabled():
            return _NormedProducts.apply(x, norm.weight, norm.eps, *weights, *biases)
        normed = _normed(x, norm.weight, _inverse(x, norm.eps))
        return [multiply(normed, *pair) for pair in zip(weights, biases, strict=True)]

    def gated(self, x: Tensor, norm: Norm | None, mlp: GatedMLP) -> Tensor:
        """[S,D] -> [S,D]; only the norm's input and the two halves are kept."""
        layers = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        if any(type(layer) is not nn.Linear or layer.bias is not None for layer in layers):
            return super().gated(x, norm, mlp)
        weights = [layer.weight for layer in layers]
        scale, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        if torch.is_grad_enabled():
            return _NormedMLP.apply(x, scale, eps, *weights)
        normed = x if norm is None else _normed(x, scale, _inverse(x, eps))
        gate, up = multiply(normed, weights[0]), multiply(normed, weights[1])
        return multiply(F.silu(gate, inplace=True).mul_(up), weights[2])

    def attend(
        self, attention: Attention, layer: int, heads: Sequence[Tensor], rotation: Rotation | None, scaling: float
    ) -> Tensor:
        """Query [S,H,d], key and value [S,Hkv,d] -> [S,H,d]."""
        query, key, value = heads
        if rotation is not None:
            turn = _Rotation.apply if torch.is_grad_enabled() else rotate
            query, key = turn(query, *rotation), turn(key, *rotation)
        return attention.attend(layer, query, key, value, scaling)


LEAN = Lean()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as `decoder.rotated`, with one new tensor instead of four."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _inverse(x: Tensor, eps: float) -> Tensor:
    """[..,D] -> [..,1]: 1 / r, with r = sqrt(mean x^2 + eps)."""
    return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _normed(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """[..,D]: x / r * weight, the same bits whenever it is computed."""
    return x.mul(inverse).mul_(weight)


def _norm_gradient(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x [..,D] and weight [D]; dy is overwritten.

    With n = x / r and g = weight dy: dx = (g - n mean(g n)) / r and d_weight = sum dy n.
    """
    n = x * inverse
    d_weight = (dy * n).flatten(0, -2).sum(0)
    g = dy.mul_(weight)
    return g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(inverse), d_weight


class _Rotation(torch.autograd.Function):
    """y = R x and dx = R^T dy: the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, -sin), None, None


class _Norm(torch.autograd.Function):
    """y = weight x / r, which keeps x and 1 / r alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return _normed(x, weight, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return *_norm_gradient(dy.clone(), *ctx.saved_tensors), None


class _NormedProducts(torch.autograd.Function):
    """y_i = n W_i^T + b_i with n = norm(x), which keeps x and 1 / r alone: dn = sum dy_i W_i, dW_i = dy_i^T n."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, eps: float, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights, biases = parameters[:count], parameters[count:]
        inverse = _inverse(x, eps)
        normed = _normed(x, scale, inverse)
        ctx.save_for_backward(x, scale, inverse, *weights)
        ctx.biased = [bias is not None for bias in biases]
        return tuple(multiply(normed, *pair) for pair in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream: Tensor):
        x, scale, inverse, *weights = ctx.saved_tensors
        normed, d_normed = _normed(x, scale, inverse), None
        d_weights, d_biases = [], []
        for dy, weight, biased in zip(upstream, weights, ctx.biased, strict=True):
            d_normed = multiply(dy, weight.t(), added=d_normed)
            d_weights.append(dy.t() @ normed)
            d_biases.append(dy.sum(0) if biased else None)
        dx, d_scale = _norm_gradient(d_normed, x, scale, inverse)
        return dx, d_scale, None, *d_weights, *d_biases


class _NormedMLP(torch.autograd.Function):
    """y = (silu(a) * b) W^T with a = n A^T, b = n B^T and n = norm(x), which keeps x, 1 / r, a and b alone.

    Two tensors of the size of a are made in backward, and used for all that has their size. Without a norm n is x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor | None, eps: float, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        inverse = None if scale is None else _inverse(x, eps)
        normed = x if scale is None else _normed(x, scale, inverse)
        a, b = multiply(normed, gate), multiply(normed, up)
        ctx.save_for_backward(x, scale, inverse, a, b, gate, up, down)
        return multiply(F.silu(a).mul_(b), down)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, scale, inverse, a, b, gate, up, down = ctx.saved_tensors
        activated = F.silu(a)
        product = activated * b
        d_down = dy.t() @ product
        del product  # so that its memory can be taken again
        d_product = multiply(dy, down.t())
        db = activated.mul_(d_product)
        da = torch.ops.aten.silu_backward(d_product.mul_(b), a, grad_input=d_product)
        normed = x if scale is None else _normed(x, scale, inverse)
        d_gate, d_up = da.t() @ normed, db.t() @ normed
        del normed
        d_normed = multiply(db, up.t(), added=multiply(da, gate.t()))
        if scale is None:
            return d_normed, None, None, d_gate, d_up, d_down
        dx, d_scale = _norm_gradient(d_normed, x, scale, inverse)
        return dx, d_scale, None, d_gate, d_up, d_down
