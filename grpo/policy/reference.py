"""The frozen reference of the KL, and the copy that the sampler decodes with in half precision or beside adapters.

Left out: when the reference is renewed (`update.py`).
"""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo import distributed
from grpo.policy.lora import adapted, merge, merged
from grpo.policy.model import Policy
from grpo.tree import PackedTree


def reference_of(policy: Policy) -> nn.Module:
    """The reference of a run that begins with this policy: a frozen copy, or itself without its adapters."""
    return WithoutAdapters(policy) if adapted(policy) else frozen_copy(policy)


class WithoutAdapters(nn.Module):
    """A policy with its adapters off, called like a policy: the base model, with no weights of its own."""

    layers = ()
    """None of its own: there is nothing to compile."""

    def __init__(self, policy: Policy):
        """Take the policy itself, not its DistributedDataParallel wrapper: no gradient is exchanged here."""
        super().__init__()
        self.policy = policy
        self.switched = list(adapted(policy).values())

    def forward(self, tree: PackedTree, temperature: float) -> tuple[Tensor, Tensor]:
        """As of the policy, without a gradient."""
        assert not torch.is_grad_enabled(), "what is computed again in backward would have adapters"
        try:
            for layer in self.switched:
                layer.on = False
            return self.policy(tree, temperature)
        finally:
            for layer in self.switched:
                layer.on = True


def frozen_copy(policy: Policy) -> Policy:
    """A copy without gradients, for the reference and for sampling. Its forward gives the same numbers.

    Under autocast, the weights of linear layers are stored rounded, as autocast would round them in each forward.
    Embeddings, norms and the head keep their dtype. Adapters become part of the weights. Beside them embeddings, norms
    and head never change, so these are shared and not copied.
    """
    head = policy.model.get_output_embeddings()
    own = [x for x in policy.modules() if not isinstance(x, nn.Linear) or x is head] if adapted(policy) else []
    shared = [p for module in own for p in module.parameters(recurse=False) if not p.requires_grad]
    frozen = copy.deepcopy(policy, {id(p): p for p in shared}).requires_grad_(False)
    merge(frozen)
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
    for old, (_, new) in zip(reference.parameters(), merged(policy), strict=True):
        if isinstance(new, DTensor) and not isinstance(old, DTensor):  # a sampler's copy: weight by weight
            new = distributed.whole(new, old.dtype)
        old.copy_(new if share == 1 else old.to(new.dtype).lerp(new, share))
