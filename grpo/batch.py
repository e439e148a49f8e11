"""The two dataclasses that pass data on: `Completions` from the sampler, and `Batch` to the learner. No algorithm.

Both can be selected from and joined. A group, the G completions of one prompt, always stays together.

Shape letters, used everywhere: N prompts in a step, G group size, B = N*G sequences (siblings adjacent), T padded
completion length, V vocabulary, K reward terms, S tokens of a packed tree, M predicted tokens. Masks are bool and
True = keep.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from numbers import Integral
from typing import Any

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

    def batch(self, prompt_ids: Sequence[Sequence[int]] | Tensor, **others: Any) -> "Batch":
        """The completions with their prompts, as a batch.

        Args:
            prompt_ids: the N prompts that were completed.
            others: further fields of the batch, such as `advantages`.
        """
        return Batch(
            prompt_ids=prompt_ids,
            completion_ids=self.completion_ids,
            completion_mask=self.completion_mask,
            sampling_logprobs=self.sampling_logprobs,
            **others,
        )

    def told(self, max_new_tokens: int) -> dict[str, list]:
        """{name: B values} of what a reward may ask for beside text and problem: see `rewards.TOLD`."""
        lengths = self.completion_mask.sum(1).tolist()
        rows = zip(self.completion_ids.tolist(), lengths, strict=True)
        return {
            "tokens": [ids[:length] for ids, length in rows],
            "length": lengths,
            "cap": [max_new_tokens] * len(lengths),
            "finished": self.finished.tolist(),
        }

    def select(self, prompts: Sequence[int], group_size: int) -> "Completions":
        """All completions of some prompts, in the given order.

        Args:
            prompts: positions 0..N-1 of the prompts.
            group_size: G, which the completions do not know.
        """
        rows = _rows_of(prompts, group_size)
        return Completions(**_take(self, rows), texts=[self.texts[row] for row in rows])

    @staticmethod
    def join(parts: Sequence["Completions"]) -> "Completions":
        """The rows of all parts one after the other, padded to the widest T."""
        return Completions(**_join(parts))


def no_completions(device: torch.device) -> Completions:
    """The completions of a rank without a prompt: no rows."""
    empty = torch.zeros(0, 1, device=device, dtype=torch.float32)
    return Completions(empty.long(), empty.bool(), empty[:, 0].bool(), empty, [])


@dataclass
class Batch:
    """The sequences of a step on one rank, ready for learning. Completion tensors are [B,T], right-padded.

    Log-probabilities are in nats at the sampling temperature, without gradient. Those of the current policy, with
    gradient, are computed anew for each update.

    Raises:
        ValueError: prompts are no token lists, or a tensor does not have its shape.
    """

    prompt_ids: list[list[int]]
    """N lists of token ids, unpadded. A tensor of N rows is made into lists."""
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
    ref_logprobs: Tensor | None = None
    """[B,T]: of the frozen reference. None: not computed yet, or there is no reference."""
    surrogate_mask: Tensor | None = None
    """[B,T] bool: tokens with a policy gradient; None: all that are learned from."""
    prompt_index: list[int] | None = None
    """N ints: the number of each prompt in the step, counted over all ranks."""

    def __post_init__(self) -> None:
        """Raises ValueError for prompts that are no token lists, and for the first tensor with another shape."""
        self.prompt_ids = token_lists(self.prompt_ids)
        N, (B, T) = len(self.prompt_ids), self.completion_ids.shape
        if N * self.group_size != B:
            raise ValueError(f"completion_ids: {B} rows for {N} prompts; must be as many rows for every prompt")
        if self.completion_mask.dtype != torch.bool:
            raise ValueError(f"completion_mask: is {self.completion_mask.dtype}; must be torch.bool, True = learn")
        for name, value in _tensors(self).items():
            shape = tuple(value.shape)
            if shape != (B, T) and (name != "advantages" or shape != (B,)):
                allowed = f"{(B,)} or {(B, T)}" if name == "advantages" else f"{(B, T)}"
                raise ValueError(f"{name}: has the shape {shape}; must be {allowed}")

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

    def select(self, prompts: Sequence[int]) -> "Batch":
        """The batch of some prompts with all of their completions, in the given order.

        Args:
            prompts: positions in `prompt_ids`.
        """
        return self._part(prompts, _rows_of(prompts, self.group_size))

    def take(self, rows: Sequence[int]) -> "Batch":
        """The batch of some rows, each with a prompt of its own: the group size is 1.

        Args:
            rows: positions in `completion_ids`.
        """
        return self._part([row // self.group_size for row in rows], rows)

    def _part(self, prompts: Sequence[int], rows: Sequence[int]) -> "Batch":
        index = None if self.prompt_index is None else [self.prompt_index[i] for i in prompts]
        return Batch(prompt_ids=[self.prompt_ids[i] for i in prompts], prompt_index=index, **_take(self, rows))

    @staticmethod
    def join(parts: Sequence["Batch"]) -> "Batch":
        """The groups of all parts one after the other, padded to the widest T. A part may be without prompts.

        Raises:
            ValueError: group sizes differ, or a tensor is in one part and not in another.
        """
        sizes = sorted({part.group_size for part in parts if part.prompt_ids})
        if len(sizes) > 1:
            raise ValueError(f"join: the parts have the group sizes {sizes}; must be one and the same")
        return Batch(**_join(parts))

    def refuse_unlearnable(self, group_size: int) -> None:
        """Raise ValueError for a batch that can not be learned from, or that has groups of another size."""
        for name in ("advantages", "sampling_logprobs"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: the batch has none, and a step can not be learned without them")
        if self.prompt_ids and self.group_size != group_size:
            raise ValueError(f"group_size is {group_size}: the batch has groups of {self.group_size}")

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        return replace(self, **{name: value.to(device) for name, value in _tensors(self).items()})


def token_lists(prompt_ids: Iterable) -> list[list[int]]:
    """Prompts as lists of token ids, from lists, arrays or a tensor; ValueError if they are something else."""
    prompts = [prompt.tolist() if hasattr(prompt, "tolist") else prompt for prompt in prompt_ids]
    for prompt in prompts:
        # The first token speaks for the others: this is read for every micro-batch.
        if not isinstance(prompt, list | tuple) or (prompt and not isinstance(prompt[0], Integral)):
            raise ValueError(
                f"prompt_ids: {str(prompt)[:60]!r} is no prompt: must be a list of token ids; encode texts with the "
                "tokenizer first"
            )
    return [list(prompt) for prompt in prompts]


def _rows_of(prompts: Sequence[int], group_size: int) -> list[int]:
    return [i * group_size + j for i in prompts for j in range(group_size)]


def _tensors(data: Completions | Batch) -> dict[str, Tensor]:
    """The fields that are tensors."""
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _take(data: Completions | Batch, rows: Sequence[int]) -> dict[str, Tensor]:
    """A copy of some rows of every tensor."""
    places = torch.tensor(rows, dtype=torch.long).to(data.completion_ids.device)
    return {name: value[places] for name, value in _tensors(data).items()}


def _join(parts: Sequence[Completions] | Sequence[Batch]) -> dict[str, Any]:
    """The fields of all parts, one part after the other. Tensors [B,T] are padded with 0 to the widest T."""
    if not parts:
        raise ValueError("join: there is no part; must be at least one")
    T = max(part.completion_ids.shape[1] for part in parts)
    joined = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        missing = sum(value is None for value in values)
        if 0 < missing < len(values):
            raise ValueError(f"join: {missing} of {len(values)} parts have no {field.name}; must be all or none")
        if missing:
            joined[field.name] = None
        elif isinstance(values[0], Tensor):
            joined[field.name] = torch.cat([_padded(value, T) for value in values])
        else:
            joined[field.name] = list(chain.from_iterable(values))
    return joined


def _padded(value: Tensor, T: int) -> Tensor:
    """[B,t] -> [B,T], with 0 or False behind; [B] stays as it is."""
    return torch.nn.functional.pad(value, (0, T - value.shape[1])) if value.dim() == 2 else value
