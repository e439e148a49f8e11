"""The frozen reference of the KL, which is also what the sampler decodes with in half precision.

Left out: when it is renewed (`update.py`).
"""

import copy

import torch
from torch import nn

from grpo.policy.model import Policy


def frozen_copy(policy: Policy) -> Policy:
    """A copy without gradients, for the reference and for sampling. Its forward gives the same numbers.

    Under autocast, the weights of linear layers are stored rounded, as autocast would round them in each forward.
    Embeddings, norms and the head keep their dtype.
    """
    frozen = copy.deepcopy(policy).requires_grad_(False)
    frozen.compiled = False  # copies of an nn.Module lose what `compile` made
    head = frozen.model.get_output_embeddings()
    if policy.autocast_dtype is not None:
        for module in frozen.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.to(policy.autocast_dtype)
    return frozen


@torch.no_grad()
def mix_in(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """Move a frozen copy towards the policy: ref <- share * policy + (1 - share) * ref, weight by weight.

    With share 1 it becomes what `frozen_copy(policy)` is. Weights that are stored rounded are rounded after mixing.
    """
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        old.copy_(new if share == 1 else old.to(new.dtype).lerp(new, share))
