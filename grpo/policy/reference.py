"""The frozen reference of the KL: log-probabilities under the policy that a run starts from.

Its weights never change, and all prompts of a few-shot run begin with the same exemplars. Later tokens need nothing of
these but keys and values, so they are computed once per run instead of once per pass: with 8 shots, a fifth of what a
pass computes. The numbers are those of a whole pass up to rounding, and to the bit where rows part at the end of the
trunk and a product's rows do not depend on how many there are, as with the libraries of x86 in float32. So it is done
on a CPU alone: where matrices are rounded to bfloat16, or a GPU chooses kernels by shape, policy and reference would
differ by more in the first step. Left out: compiled layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grpo.policy.attention import KeysValues, PrefillAttention
from grpo.policy.model import Policy, frozen_copy
from grpo.tree import PackedTree

MIN_TRUNK = 64
"""The shortest trunk worth remembering, in tokens."""


def remembers(device: str, half: bool, compiled: bool, trunk_tokens: int) -> bool:
    """Whether a trunk is computed once: on a CPU, nothing rounded (`half`) or compiled, if it is long enough."""
    return device == "cpu" and not half and not compiled and trunk_tokens >= MIN_TRUNK


class Reference(nn.Module):
    """A frozen copy of a policy that remembers what all prompts begin with."""

    def __init__(self, policy: Policy):
        """Copy the policy as it is now."""
        super().__init__()
        self.policy = frozen_copy(policy)
        self.trunk_ids = torch.empty(0, dtype=torch.long)
        self.trunk: KeysValues | None = None

    @torch.no_grad()
    def remember(self, trunk_ids: Sequence[int]) -> None:
        """Compute keys and values of a trunk once, for all passes over trees that begin with it.

        The same trunk in the whole run: a resumed one then computes what it would have computed without the break.

        Args:
            trunk_ids: tokens that prompts begin with. Where `remembers` says no, nothing is.
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
        """As `Policy.forward`."""
        return self.policy(tree, temperature, self.trunk if self._begins(tree) else None)

    def _begins(self, tree: PackedTree) -> bool:
        """Whether all rows of the tree begin with the trunk, and none of its tokens predicts."""
        t, S = len(self.trunk_ids), len(tree.input_ids)
        if self.trunk is None or t >= S or not torch.equal(tree.input_ids[:t], self.trunk_ids):
            return False
        return bool((tree.position_ids[t - 1] == t - 1) & (tree.subtree_end[t - 1] == S) & (tree.source >= t).all())
