"""The two dataclasses that pass data on: `Completions` from the sampler, and `Batch` to the learner. No algorithm.

Shape letters, used everywhere: N prompts in a step, G group size, B = N*G sequences (siblings adjacent), T padded
completion length, V vocabulary, K reward terms, S tokens of a packed tree, M predicted tokens. Masks are bool and
True = keep.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Completions:
    """What `Sampler.generate` returns for N prompts with G samples each. Row `i * G + j` is sample j of prompt i.

    A row ends with an EOS token, with the token that completes a stop string, or at `max_new_tokens`. Padding follows
    from the length and never from token values: padded positions hold 0 in every tensor and False in the mask.
    """

    completion_ids: Tensor
    """[B,T] int64: sampled tokens, including the one that ended the row, right-padded with 0."""
    completion_mask: Tensor
    """[B,T] bool: True on sampled tokens."""
    finished: Tensor
    """[B] bool: True if ended by an EOS or a stop string, False if cut at `max_new_tokens`."""
    sampling_logprobs: Tensor
    """[B,T]: log-probability of each sampled token, as the sampler computed it."""
    texts: list[str]
    """B texts, cut before the stop string, without EOS and padding. Other special tokens stay."""


@dataclass
class Batch:
    """The sequences of a step on one rank, ready for learning. Completion tensors are [B,T], right-padded."""

    prompt_ids: list[list[int]]
    """N lists of token ids, unpadded."""
    completion_ids: Tensor
    """[B,T] int64."""
    completion_mask: Tensor
    """[B,T] bool: tokens that were sampled and are learned from."""
    advantages: Tensor | None = None
    """[B] or [B,T]: the loss broadcasts [B] over tokens."""
    sampling_logprobs: Tensor | None = None
    """[B,T]: as the sampler computed them."""
    old_logprobs: Tensor | None = None
    """[B,T]: of the policy at rollout time. None: detach the current ones (exactly on-policy)."""
    prompt_index: list[int] | None = None
    """N ints: the number of each prompt in the step, counted over all ranks."""

    @property
    def group_size(self) -> int:
        """G, from the shapes."""
        return len(self.completion_ids) // len(self.prompt_ids) if self.prompt_ids else 0

    def completions(self) -> list[list[list[int]]]:
        """The unpadded completions of each prompt. A row ends with the last token that the mask keeps."""
        T, G = self.completion_ids.shape[1], self.group_size
        columns = torch.arange(1, T + 1, device=self.completion_mask.device)
        lengths = (self.completion_mask * columns).amax(1).tolist() if T else [0] * len(self.completion_ids)
        rows = [ids[:length] for ids, length in zip(self.completion_ids.tolist(), lengths, strict=True)]
        return [rows[i * G : (i + 1) * G] for i in range(len(self.prompt_ids))]

    def select(self, prompts: list[int]) -> "Batch":
        """The batch of some prompts with all of their completions, in the given order.

        Args:
            prompts: positions in `prompt_ids`.
        """
        G = self.group_size
        rows = torch.tensor([i * G + j for i in prompts for j in range(G)], dtype=torch.long)
        rows = rows.to(self.completion_ids.device)
        per_row = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in ("completion_ids", "completion_mask", "advantages", "sampling_logprobs", "old_logprobs")
        }
        index = None if self.prompt_index is None else [self.prompt_index[i] for i in prompts]
        return Batch(prompt_ids=[self.prompt_ids[i] for i in prompts], prompt_index=index, **per_row)
