"""Token weights: the only place with a denominator.

The weights are made once per update, from counts over the whole update and all ranks; after that the loss of any part
of it is `(token_weights * per_token_loss).sum()`, and parts add up to the same loss and gradient however they are cut:
micro-batches, accumulation, ranks. Nothing is averaged later (the averaging that DDP does is undone by the caller).
Rows without a kept token weigh nothing and are not counted.
"""

import torch
from torch import Tensor


def count(mask: Tensor) -> tuple[int, int]:
    """(num_tokens, num_sequences): kept tokens, and rows with at least one, of mask [B,T]; to be summed over ranks."""
    return int(mask.sum()), int(mask.any(-1).sum())


def count_groups(mask: Tensor, group_size: int) -> tuple[int, Tensor]:
    """Groups with a kept token, and how many each has.

    Args:
        mask: [B,T] bool, B = N * group_size with siblings adjacent; whole groups of the update.
        group_size: completions of a prompt.

    Returns:
        num_groups, to be summed over ranks, and group_tokens [B]: the kept tokens of a row's group.
    """
    tokens = mask.sum(-1).view(-1, group_size).sum(-1)
    return int((tokens > 0).sum()), tokens.repeat_interleave(group_size)


def token_mean(
    mask: Tensor, *, num_tokens: int, num_sequences: int, max_new_tokens: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """w_it = mask_it / num_tokens: every token of the update counts the same. Sum over the update: 1.

    DAPO, https://arxiv.org/abs/2503.14476 eq. 8, with the mean over the whole update rather than per group.

    Args:
        mask: [B,T] bool, True = learned from; any part of the update.
        num_tokens, num_sequences: `count` of the whole update, over all ranks. max_new_tokens: not used here.
        dtype: that of the log-probabilities.

    Returns:
        [B,T] in `dtype`.
    """
    return mask.to(dtype) / max(num_tokens, 1)


def sequence_mean(
    mask: Tensor, *, num_tokens: int, num_sequences: int, max_new_tokens: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """w_it = mask_it / length_i / num_sequences: every sequence counts the same. Sum over the update: 1.

    GRPO, https://arxiv.org/abs/2402.03300 eq. 3. A token of a long completion weighs less.

    Args:
        mask: [B,T] bool, True = learned from; any rows of the update, each row whole.
        num_tokens, num_sequences: `count` of the whole update, over all ranks. max_new_tokens: not used here.
        dtype: that of the log-probabilities.

    Returns:
        [B,T] in `dtype`.
    """
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    return mask.to(dtype) / length / max(num_sequences, 1)


def constant_length(
    mask: Tensor, *, num_tokens: int, num_sequences: int, max_new_tokens: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """w_it = mask_it / (num_sequences * max_new_tokens): a sum per sequence, divided by a constant. Sum: at most 1.

    Dr. GRPO, https://arxiv.org/abs/2503.20783: no weight depends on the length of a completion.

    Args:
        mask: [B,T] bool, True = learned from; any part of the update.
        num_tokens, num_sequences: `count` of the whole update, over all ranks.
        max_new_tokens: the cap on the length of a completion, in tokens.
        dtype: that of the log-probabilities.

    Returns:
        [B,T] in `dtype`.
    """
    return mask.to(dtype) / (max(num_sequences, 1) * max_new_tokens)


def prompt_mean(mask: Tensor, *, num_groups: int, group_tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """w_it = mask_it / tokens of the group / num_groups: every prompt counts the same. Sum over the update: 1.

    DAPO's own formula, https://arxiv.org/abs/2503.14476 eq. 8; ScaleRL, https://arxiv.org/abs/2510.13786.

    Args:
        mask: [B,T] bool, True = learned from; any part of the update.
        num_groups: `count_groups` of the whole update, over all ranks.
        group_tokens: [B], kept tokens of the row's group in the update, those outside of this part included.
        dtype: that of the log-probabilities.

    Returns:
        [B,T] in `dtype`.
    """
    return mask.to(dtype) / group_tokens.clamp(min=1)[:, None] / max(num_groups, 1)


WEIGHTINGS = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "prompt_mean": prompt_mean,
    "constant_length": constant_length,
}

# The tests check every entry of the table for what all weightings share. They check the names in this set for more.
SUM_TO_ONE = frozenset({"token_mean", "sequence_mean", "prompt_mean"})
"""The weights of an update sum to 1."""
