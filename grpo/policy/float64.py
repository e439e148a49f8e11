"""Under `precision: fp64` everything is float64: forwards that keep the dtype, in place of those that round to float32.

transformers computes RMSNorm and rotary angles in float32 whatever the model's dtype, which hides errors below 1e-7.
Left out: norms and rotary embeddings of another form than Llama's, which are refused.
"""

from types import MethodType

import torch
from torch import Tensor, nn

from grpo.policy.lean import norm_forward


def keep_float64(model: nn.Module) -> None:
    """Replace forwards of transformers that compute in float32 (RMSNorm, rotary angles) by dtype-keeping ones.

    Raises:
        ValueError: a norm or rotary embedding of the model is of another form than Llama's.
    """
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            forward, example = norm_forward, (torch.linspace(-1, 2, module.weight.numel()),)
        elif name.endswith("RotaryEmbedding"):
            forward, example = _rotary, (torch.zeros(1, 3, 2), torch.tensor([[0, 1, 7]]))
        else:
            continue
        before = _tuple(module(*example))
        module.forward = MethodType(forward, module)
        try:
            pairs = zip(before, _tuple(module(*example)), strict=True)
            same = all(torch.allclose(a.double(), b.double(), atol=1e-5) for a, b in pairs)
        except AttributeError:  # Llama's have `variance_epsilon` and `inv_freq`
            same = False
        if not same:
            raise ValueError(f"precision: fp64 does not support {name}, which is of another form than Llama's")


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _rotary(module: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[..,S] positions -> cos and sin [..,S,d], in the dtype of x."""
    angles = position_ids[..., None].to(x.dtype) * module.inv_freq.to(x.dtype)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling
