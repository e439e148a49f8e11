"""Prompts -> completions, by hand: prefill the prompts' tree once, decode all rows together, stop, compact.

Each token is drawn by inverse CDF from a uniform that is a hash of (seed, purpose, step, prompt, sample, token), so a
completion does not depend on batch layout, rank or resume. A row ends with the token that is an EOS or that completes a
stop string in the decoded text, wherever the string begins; it then leaves the batch. Left out: top-k, top-p and beams
(the learner's softmax is the whole one), and refilling the batch with further prompts.
"""

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.batch import Completions
from grpo.decoding import DecodeAttention, PrefillAttention
from grpo.logprobs import product
from grpo.policy import Policy, eos_ids, frozen_copy
from grpo.sampling import sample, uniforms
from grpo.tree import build_trie


class StopStrings:
    """Finds the first token that completes a stop string in a row's text, and cuts the text there.

    Decoding the whole row at every token would be exact and slow. A token can complete a string only if its own text
    holds the string's last character, so only such tokens are looked at, and then the whole row is decoded. Where one
    character may take several tokens (non-ASCII) or vanish from a token's own text (white space), all are looked at.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]):
        """Mark the tokens that may complete one of the strings; none may be empty."""
        if any(not string for string in stop):
            raise ValueError(f"stop: {list(stop)!r} holds an empty string, which would end every completion at once")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.may_complete = torch.zeros(len(tokenizer), dtype=torch.bool)
        last = {string[-1] for string in stop}
        if any(not c.isascii() or c.isspace() for c in last):
            self.may_complete[:] = True
        elif last:
            texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
            self.may_complete[:] = torch.tensor([not last.isdisjoint(text) for text in texts])

    def text(self, ids: list[int]) -> str:
        """The row's text, special tokens removed, nothing cleaned up."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def find(self, text: str) -> int:
        """Where the first stop string begins in the text; -1 if there is none."""
        return min((at for string in self.stop if (at := text.find(string)) >= 0), default=-1)

    def tokens_to_stop(self, ids: list[int]) -> int | None:
        """The number of the row's tokens up to the one that completes its first stop string; None without one."""
        if not self.stop or self.find(self.text(ids)) < 0:
            return None
        return bisect.bisect_left(range(len(ids)), True, key=lambda n: self.find(self.text(ids[: n + 1])) >= 0) + 1

    def cut(self, ids: list[int]) -> str:
        """The row's text before its first stop string."""
        text = self.text(ids)
        at = self.find(text)
        return text if at < 0 else text[:at]


class Sampler:
    """Draws completions from a policy. Built once per run; `refresh` brings in the policy's new weights."""

    def __init__(self, model: Policy | PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Wrap a policy, or a causal language model of transformers.

        Where weights and compute dtype are the same (CPU), the policy's own weights are read; under autocast the
        sampler keeps a copy with rounded linear layers, so that no decoding step rounds them again.

        Args:
            model: what to sample from.
            tokenizer: its tokenizer, for EOS, stop strings and texts.
        """
        policy = model if isinstance(model, Policy) else Policy(model, tokenizer)
        self.policy = policy if policy.autocast_dtype is None else frozen_copy(policy)
        self.tokenizer = tokenizer
        self.is_eos = torch.zeros(policy.vocab_size, dtype=torch.bool)
        self.is_eos[[i for i in eos_ids(policy.model, tokenizer) if i < policy.vocab_size]] = True
        self._stops: dict[tuple[str, ...], StopStrings] = {}

    @torch.no_grad()
    def refresh(self, policy: Policy) -> None:
        """Copy the policy's weights in place; nothing to do where they are shared."""
        if self.policy is not policy:
            for ours, theirs in zip(self.policy.parameters(), policy.parameters(), strict=True):
                ours.copy_(theirs)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        step: int,
        prompt_index: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        purpose: str = "train",
    ) -> Completions:
        """Draw `group_size` completions of every prompt.

        Args:
            prompt_ids: N token lists, none empty; the prefixes that they share are computed once.
            group_size: G, completions per prompt.
            max_new_tokens: tokens at most per completion, the ending one included.
            temperature: divides the logits; 0 = greedy, whose log-probabilities are those at temperature 1.
            seed, step: of the run; with `prompt_index` they name the uniforms.
            prompt_index: N numbers of the prompts in the step, counted over all ranks; default 0..N-1.
            stop: strings that end a completion.
            purpose: `train` or `evaluation`: different uniforms.

        Returns:
            Completions of B = N * G rows, row `i * G + j` being sample j of prompt i; T is the longest row.

        Raises:
            ValueError: a prompt or a stop string is empty, a size is below 1, or `temperature` below 0.
        """
        sizes = {"group_size": (group_size, 1), "max_new_tokens": (max_new_tokens, 1), "temperature": (temperature, 0)}
        for name, (value, least) in sizes.items():
            if value < least:
                raise ValueError(f"{name}: {value} must be at least {least}")
        if not prompt_ids or any(len(prompt) == 0 for prompt in prompt_ids):
            raise ValueError("prompt_ids: there has to be a prompt, and every prompt needs at least one token")
        rows = _Rows(self, prompt_ids, group_size, max_new_tokens, self._stop_strings(tuple(stop)))
        index = torch.arange(len(prompt_ids)) if prompt_index is None else torch.as_tensor(prompt_index)
        prompt = index.repeat_interleave(group_size)
        draw = torch.arange(group_size).repeat(len(prompt_ids))
        logits = rows.prefill(prompt_ids)
        for t in range(max_new_tokens):
            u = uniforms(seed, purpose, step, prompt[rows.alive], draw[rows.alive], t)
            ids, logprobs = sample(logits, u.to(logits.device), temperature)
            if not rows.append(ids, logprobs):
                break
            if t + 1 < max_new_tokens:
                logits = rows.decode()
        return rows.completions()

    def _stop_strings(self, stop: tuple[str, ...]) -> StopStrings:
        if stop not in self._stops:
            self._stops[stop] = StopStrings(self.tokenizer, stop)
        return self._stops[stop]


class _Rows:
    """The rows of one `generate`: what was drawn, who is alive, and the attention over what was computed."""

    def __init__(self, sampler: Sampler, prompt_ids, group_size: int, max_new_tokens: int, stops: StopStrings):
        B = len(prompt_ids) * group_size
        self.policy, self.stops, self.is_eos = sampler.policy, stops, sampler.is_eos
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.ids: list[list[int]] = [[] for _ in range(B)]
        self.logprobs: list[Tensor] = []
        self.drawn_by: list[Tensor] = []
        self.finished = torch.zeros(B, dtype=torch.bool)
        self.alive = torch.arange(B)
        self.lengths = torch.tensor([len(prompt) for prompt in prompt_ids]).repeat_interleave(group_size)

    def prefill(self, prompt_ids) -> Tensor:
        """Compute the prompts' tree once; returns the first logits of every row [B,V]."""
        trie = build_trie(prompt_ids)
        device = self.policy.device
        position_ids = torch.from_numpy(trie.position_ids)
        attention = PrefillAttention(position_ids, torch.from_numpy(trie.subtree_end), self.policy.heads_per_key)
        last = torch.tensor([path[-1] for path in trie.paths], device=device)
        with self.policy.autocast():
            input_ids = torch.from_numpy(trie.input_ids).to(device)
            hidden = self.policy.hidden_states(input_ids, position_ids.to(device), attention)[last]
        self.attention = DecodeAttention(attention, trie, self.group_size, self.max_new_tokens)
        return self._logits(hidden).repeat_interleave(self.group_size, 0)

    def append(self, ids: Tensor, logprobs: Tensor) -> bool:
        """Take the newest tokens [n] of the alive rows, and let finished rows leave; False when none is left."""
        self.newest = ids
        self.logprobs.append(logprobs)
        self.drawn_by.append(self.alive)
        ids = ids.cpu()
        ends = self.is_eos[ids]
        suspects = (self.stops.may_complete[ids] & ~ends).tolist()
        for i, (row, token) in enumerate(zip(self.alive.tolist(), ids.tolist(), strict=True)):
            self.ids[row].append(token)
            if suspects[i] and self.stops.find(self.stops.text(self.ids[row])) >= 0:
                ends[i] = True
        self.finished[self.alive[ends]] = True
        if not ends.any():
            return True
        if ends.all():
            return False
        order = self.attention.keep(~ends)
        self.alive = self.alive[order]
        self.newest = self.newest[order.to(self.newest.device)]
        return True

    def decode(self) -> Tensor:
        """One forward of the newest tokens; returns the next logits [n,V]."""
        position_ids = (self.lengths[self.alive] + self.attention.length).to(self.newest.device)
        with self.policy.autocast():
            hidden = self.policy.hidden_states(self.newest, position_ids, self.attention)
        self.attention.advance()
        return self._logits(hidden)

    def completions(self) -> Completions:
        """Everything drawn, padded to the longest row."""
        B, T = len(self.ids), len(self.logprobs)
        device = self.policy.device
        lengths = torch.tensor([len(row) for row in self.ids])
        mask = torch.arange(T) < lengths[:, None]
        completion_ids = torch.zeros(B, T, dtype=torch.long)
        completion_ids[mask] = torch.tensor([token for row in self.ids for token in row])
        logprobs = self.logprobs[0].new_zeros(B, T)
        for t, (rows, values) in enumerate(zip(self.drawn_by, self.logprobs, strict=True)):
            logprobs[rows.to(device), t] = values
        texts = [self.stops.cut(row[:-1] if self.is_eos[row[-1]] else row) for row in self.ids]
        return Completions(completion_ids.to(device), mask.to(device), self.finished.to(device), logprobs, texts)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n,D] -> [n,V]: the head's product leaves the matrix product in float32, as in learning."""
        head = self.policy.head
        dtype = self.policy.autocast_dtype if hidden.is_cuda and self.policy.autocast_dtype else head.dtype
        return product(hidden.to(dtype), head.to(dtype).t())
