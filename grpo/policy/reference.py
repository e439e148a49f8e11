"""The frozen reference of the KL, which is also what the sampler decodes with in half precision.

Left out: when it is renewed; a run keeps the policy that it starts from.
"""

import copy

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
