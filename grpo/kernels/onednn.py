"""Float32 linear layers on a CPU through oneDNN, with weights in its fastest layout where asked.

torch gives float32 products to MKL, which is a tenth slower on some processors. This file calls the operations that
`torch.compile` would use instead of `nn.Linear`. A weight's gradient still runs in MKL: it is a product of two
transposed matrices, which oneDNN would copy first. Left out: other devices and dtypes, and small weights, where
starting the product takes longer than computing it. These run as torch runs them.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

AVAILABLE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
"""Whether torch was built with oneDNN and the processor has AVX instructions."""
LEAST = 100_000
"""Layers with at least this many weights use oneDNN without packing."""


def packable(weight: Tensor) -> bool:
    """Whether `packed` accepts this weight: float32, on a CPU, where oneDNN is available."""
    return AVAILABLE and weight.device.type == "cpu" and weight.dtype == torch.float32


def faster(weight: Tensor) -> bool:
    """Whether to multiply by this weight with oneDNN, without packing it. Never while `torch.compile` traces."""
    return packable(weight) and weight.numel() >= LEAST and not torch.compiler.is_compiling()


def packed(weight: Tensor) -> Tensor:
    """[E,D] -> a copy for `multiply_packed`, in the layout that is fastest when few rows are multiplied."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with x [..,D], bias [E], and weight [E,D] as it is or after `packed`; returns [..,E]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """x W^T + b, without autograd.

    Args:
        x: [..,D]; [n,D] if `added` is given.
        weight: [E,D], may be a transposed view.
        bias: [E].
        added: [n,E], added to the product instead of a bias. It may be overwritten.

    Returns:
        [..,E].
    """
    if faster(weight):
        if added is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, None, "add")
        return multiply_packed(x, weight, bias)
    return F.linear(x, weight, bias) if added is None else added.addmm_(x, weight.t())


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """[..,D] -> [..,E]: the layer's output, differentiable. A module that is not a plain `nn.Linear` is just called."""
    return product(x, layer.weight, layer.bias) if type(layer) is nn.Linear else layer(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with x [..,D], weight [E,D] and bias [E]; returns [..,E], differentiable. Also for autocast."""
    if not faster(weight) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else multiply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """y = x W^T + b: dx = dy W, dW = dy^T x, db = sum dy. For weights that are frozen x is not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.biased = ctx.needs_input_grad[2]
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        d_weight = None if x is None else rows.t() @ x.flatten(0, -2)
        return multiply(dy, weight.t()), d_weight, rows.sum(0) if ctx.biased else None
