"""The frozen reference of the KL: log-probabilities under the policy that a run starts from.

The trunk is the token prefix that all prompts of a run share, such as few-shot exemplars. Later tokens need only its
keys and values, and the reference's weights never change. So the trunk is computed once per run instead of once per
pass. With 8 shots it is a fifth of what a pass computes.

The numbers are those of a whole pass up to rounding. They are equal to the bit under two conditions: rows part exactly
at the end of the trunk, and a row of a matrix product does not depend on the number of rows. The second one holds for
x86 libraries in float32. With bfloat16, or on a GPU, which chooses kernels by shape, policy and reference would differ
by more in the first step. So the trunk is remembered on a CPU only. Left out: compiled layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grpo.policy.attention import KeysValues, PrefillAttention
from grpo.policy.model import Policy, frozen_copy
from grpo.tree import PackedTree

MIN_TRUNK = 64
"""The shortest trunk that is worth remembering, in tokens."""


def remembers(device: str, half: bool, compiled: bool, trunk_tokens: int) -> bool:
    """Whether the reference computes a trunk only once: on a CPU, not in half precision, not compiled, long enough."""
    return device == "cpu" and not half and not compiled and trunk_tokens >= MIN_TRUNK


class Reference(nn.Module):
    """A frozen copy of a policy that remembers the keys and values of the trunk."""

    def __init__(self, policy: Policy):
        """Copy the policy as it is now."""
        super().__init__()
        self.policy = frozen_copy(policy)
        self.trunk_ids = torch.empty(0, dtype=torch.long)
        self.trunk: KeysValues | None = None

    @torch.no_grad()
    def remember(self, trunk_ids: Sequence[int]) -> None:
        """Compute keys and values of a trunk once, for all passes over trees that begin with it.

        Use the same trunk in the whole run. Then a resumed run computes the same numbers as an uninterrupted one.

        Args:
            trunk_ids: token ids of the trunk. If `remembers` is False for it, nothing is computed.
        """
        policy, t = self.policy, len(trunk_ids)
        if not remembers(policy.device.type, policy.autocast_dtype is not None, policy.compiled, t):
            return
        position_ids = torch.arange(t)
        attention = PrefillAttention(position_ids, torch.full((t,), t), policy.heads.per_key)
        self.trunk_ids = torch.tensor(list(trunk_ids), dtype=torch.long)
        policy.hidden_states(self.trunk_ids, position_ids, attention)
        self.trunk = [(key.contiguous(), value.contiguous()) for key, value in attention.kept]

    def forward(self, tree: PackedTree, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities [M] and entropy [M] of the tree's predictions, as `Policy.forward` returns them."""
        return self.policy(tree, temperature, self.trunk if self._begins(tree) else None)

    def _begins(self, tree: PackedTree) -> bool:
        """Whether all rows of the tree begin with the trunk, and no token of the trunk predicts anything."""
        t, S = len(self.trunk_ids), len(tree.input_ids)
        if self.trunk is None or t >= S or not torch.equal(tree.input_ids[:t], self.trunk_ids):
            return False
        return bool((tree.position_ids[t - 1] == t - 1) & (tree.subtree_end[t - 1] == S) & (tree.source >= t).all())
