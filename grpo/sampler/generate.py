"""Prompts -> completions: prefill the prompts' tree once, decode all rows together, stop, compact, refill.

Each token is drawn by inverse CDF from a uniform, a hash of (seed, purpose, step, prompt, sample, token). So the
uniforms do not depend on batch layout, rank or resume. Neither do completions, up to rounding, which never shows in
float64.

A row ends with an EOS token, or with the token that completes a stop string in the decoded text, wherever the string
begins. It then leaves the batch, and prompts that are still waiting join in its place. Left out: the device side
(`rows.py`); top-k, top-p and beams, because the learner computes the softmax of the whole vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.batch import Batch, Completions
from grpo.policy import Policy, eos_ids, frozen_copy, mix_in, refuse_beyond_positions, token_logprobs, trained
from grpo.sampler.draw import PURPOSES, Draw
from grpo.sampler.rows import Rows
from grpo.sampler.stops import StopStrings
from grpo.tree import trunk_length

CHECK_EVERY = {"cpu": 1, "cuda": 16}
"""Tokens decoded between two checks for rows that have ended, by device. A check has to wait for a GPU. Tokens drawn
after a row's end are discarded."""


class Sampler:
    """Draws completions from a policy. Built once per run; `refresh` brings in the policy's new weights."""

    def __init__(
        self,
        model: Policy | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        kernels: bool = True,
        own: bool = False,
        device: torch.device | None = None,
    ):
        """Wrap a policy, or a causal language model of transformers.

        Without autocast the sampler reads the policy's own weights. With autocast it keeps a copy with rounded linear
        layers, so that no decoding step rounds them again. Of a policy with adapters it keeps a copy with merged ones.

        Args:
            model: what to sample from.
            tokenizer: the model's tokenizer, for EOS, stop strings and texts.
            kernels: allow the Triton kernels for decoding, on a GPU in half precision. They round keys and values as
                compiled learning does, so pass False if the same policy learns without being compiled.
            own: keep a copy without autocast too. Then the sampler has older weights until the next `refresh`.
            device: of its copy; None: the policy's.
        """
        policy = model if isinstance(model, Policy) else Policy(model, tokenizer)
        copied = own or policy.autocast_dtype is not None or trained(policy) is not policy
        self.policy = frozen_copy(policy).to(device or policy.device) if copied else policy
        self.tokenizer = tokenizer
        self.is_eos = torch.zeros(policy.vocab_size, dtype=torch.bool)
        self.is_eos[[i for i in eos_ids(policy.model, tokenizer) if i < policy.vocab_size]] = True
        self.positions = policy.positions
        self.check_every = CHECK_EVERY[self.policy.device.type]
        self.rows = Rows(self.policy, own=self.policy is not policy, kernels=kernels)
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        if not policy.is_decoder:
            _refuse_other_decoding(self, policy)

    def refresh(self, policy: Policy) -> None:
        """Copy the policy's new weights into the sampler's copy, if it has one."""
        if self.policy is not policy:
            mix_in(self.policy, policy, share=1.0)

    @contextmanager
    def refreshed(self, policy: Policy, take_back: bool = False) -> Iterator[None]:
        """Sample with the policy's weights; after the block with those from before again, if that is asked for.

        Until then these wait in the memory of the host.
        """
        before = [old.to("cpu", copy=True) for old in self.policy.parameters()] if take_back else []
        self.refresh(policy)
        yield
        with torch.no_grad():
            for new, old in zip(self.policy.parameters() if take_back else [], before, strict=True):
                new.copy_(old)

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
        stop: str | Sequence[str] = (),
        purpose: str = "train",
        max_rows: int | None = None,
        trunk_tokens: int | None = None,
    ) -> Completions:
        """Draw `group_size` completions of every prompt.

        Args:
            prompt_ids: N token lists, none empty, or a tensor of N rows; prefixes that they share are computed once.
            group_size: G, completions per prompt.
            max_new_tokens: the most tokens of a completion, including the one that ends it.
            temperature: divides the logits. 0 means greedy; its log-probabilities are those at temperature 1.
            seed, step: of the run; the uniforms are a function of them and of `prompt_index`.
            prompt_index: N numbers, the place of each prompt in the step over all ranks; default 0..N-1.
            stop: strings that end a completion, or one string.
            purpose: `train` or `evaluation`, which draw different uniforms.
            max_rows: the most rows in flight at one time, but at least one group; further prompts join as rows end.
                None: all.
            trunk_tokens: length of the trunk, the token prefix that all prompts share (such as few-shot exemplars). It
                must be shorter than each prompt. On a GPU pass the same number in all calls of a run, so that buffers
                and captured graphs can be used again. None: the longest prefix that these prompts share.

        Returns:
            Completions of B = N * G rows; row `i * G + j` is sample j of prompt i, and T is the longest row's length.

        Raises:
            ValueError: a prompt is no list of the model's token ids; a prompt or a stop string is empty; a number is
                out of its range; the prompts do not share the trunk; a completion would go beyond learned positions.
        """
        counts = [
            ("group_size", group_size, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("seed", seed, 0),
            ("step", step, 0),
        ]
        for name, value, least in counts:
            if not _is_whole(value) or not least <= value < 2**63:
                raise ValueError(f"{name}: {value!r} must be a whole number, at least {least} and below 2**63")
        if isinstance(temperature, str) or temperature is None or not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: {temperature!r} must be a finite number, at least 0")
        if purpose not in PURPOSES:
            raise ValueError(f"purpose: {purpose!r} must be one of {', '.join(PURPOSES)}")
        prompt_ids = _token_lists(prompt_ids, len(self.policy.model.get_input_embeddings().weight))
        refuse_beyond_positions(self.positions, prompt_ids, max_new_tokens, "max_new_tokens")
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        index = list(range(len(prompt_ids))) if prompt_index is None else list(prompt_index)
        if len(index) != len(prompt_ids):
            raise ValueError(f"prompt_index: {len(index)} numbers for {len(prompt_ids)} prompts; must be as many")
        if trunk_tokens is not None:
            _refuse_no_trunk(trunk_tokens, prompt_ids)
        trunk = trunk_length(prompt_ids) if trunk_tokens is None else trunk_tokens
        draw = Draw(seed, purpose, step, temperature)
        generation = _Generation(self, prompt_ids, index, group_size, max_new_tokens, self.stop_strings(stop))
        with torch.inference_mode():  # a tenth faster than no_grad, because operations are small
            generation.run(draw, max_rows or len(prompt_ids) * group_size, trunk)
        return generation.completions()

    def stop_strings(self, stop: tuple[str, ...]) -> StopStrings:
        """The matcher for these strings. It is made once, because that looks at every word of the vocabulary."""
        if stop not in self._stops:
            self._stops[stop] = StopStrings(self.tokenizer, stop, self.is_eos.nonzero().flatten().tolist())
        return self._stops[stop]


@torch.no_grad()
def _refuse_other_decoding(sampler: Sampler, policy: Policy) -> None:
    """Raise ValueError if a model that transformers computes decodes other log-probabilities than it learns from."""
    prompts, options = [[1, 2, 3], [1, 2, 4, 5]], {"group_size": 2, "max_new_tokens": 3, "temperature": 1.0}
    try:
        drawn = sampler.generate(prompts, **options, seed=0, step=0)
        learned, _ = token_logprobs(policy, Batch(prompts, drawn.completion_ids, drawn.completion_mask), 1.0)
        gap = float((learned - drawn.sampling_logprobs).abs().max())
    except RuntimeError as error:  # shapes that do not fit
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model: {type(policy.model).__name__} can not be decoded by this sampler: {reason}"
        ) from error
    allowed = 0.3 if policy.is_half else 1e-3
    if not gap < allowed:
        raise ValueError(
            f"model: {type(policy.model).__name__} decodes one token at a time to other log-probabilities than its own "
            f"forward, by {gap:.2g} nats; decoding it is not supported"
        )


def _is_whole(value: object) -> bool:
    """Whether something is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _refuse_no_trunk(trunk: int, prompts: list[list[int]]) -> None:
    """Raise ValueError if not all prompts begin with the same so many tokens and go on."""
    shortest = min(map(len, prompts))
    if not _is_whole(trunk) or not 0 <= trunk < shortest:
        raise ValueError(
            f"trunk_tokens: {trunk!r} must be at least 0, and below {shortest}, the shortest prompt's length"
        )
    if any(prompt[:trunk] != prompts[0][:trunk] for prompt in prompts):
        raise ValueError(f"trunk_tokens: the prompts do not share their first {trunk} tokens, as they must")


def _token_lists(prompt_ids: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """Prompts as lists of ids below `rows`, from lists, arrays or a tensor; ValueError if they are something else."""
    prompts = prompt_ids.tolist() if hasattr(prompt_ids, "tolist") else prompt_ids
    prompts = list(prompts) if isinstance(prompts, Iterable) else [prompts]
    prompts = [prompt.tolist() if hasattr(prompt, "tolist") else prompt for prompt in prompts]
    for prompt in prompts:
        if not isinstance(prompt, list | tuple) or not all(_is_whole(token) for token in prompt):
            wanted = "must be a list of prompts, each a list of token ids; texts are encoded with the tokenizer first"
            raise ValueError(f"prompt_ids: {str(prompt)[:60]!r} is no prompt: {wanted}")
    if not prompts or not all(prompts):
        raise ValueError("prompt_ids: there has to be a prompt, and every prompt needs at least one token")
    lowest, highest = min(map(min, prompts)), max(map(max, prompts))
    if lowest < 0 or highest >= rows:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"prompt_ids: token id {wrong} is not one of the model's, which are 0 to {rows - 1}")
    return [list(prompt) for prompt in prompts]


class _Generation:
    """The host side of one `generate`: which prompts wait, which rows are in flight, and what ended rows have drawn."""

    def __init__(self, sampler: Sampler, prompt_ids, index, group_size: int, max_new_tokens: int, stops: StopStrings):
        B = len(prompt_ids) * group_size
        self.sampler, self.rows, self.stops, self.is_eos = sampler, sampler.rows, stops, sampler.is_eos
        self.prompt_ids, self.index = prompt_ids, index
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.waiting = list(range(len(prompt_ids)))
        self.alive: list[int] = []
        self.seen: list[int] = []
        self.ids: list[list[int]] = [[]] * B
        self.logprobs: list[Tensor] = [torch.empty(0)] * B
        self.finished = torch.zeros(B, dtype=torch.bool)

    def run(self, draw: Draw, max_rows: int, trunk: int) -> None:
        """Decode until every row of every prompt has ended."""
        G = self.group_size
        room = max(1, min(max_rows // G, len(self.waiting)))
        branch = max(map(len, self.prompt_ids)) - trunk
        self.rows.start(draw, self.prompt_ids[0][:trunk], room * G, room, branch, self.max_new_tokens)
        while self.waiting or self.alive:
            free = room - self.rows.num_groups
            if self.waiting and free and (free >= room // 4 or not self.alive):
                joining, self.waiting = self.waiting[:free], self.waiting[free:]
                self.rows.join([self.prompt_ids[i] for i in joining], [self.index[i] for i in joining], G)
                self.alive += [i * G + j for i in joining for j in range(G)]
                self.seen += [0] * (len(joining) * G)
            else:
                self.rows.decode(min(self.sampler.check_every, self.max_new_tokens - max(self.seen)))
            self._retire()
        self.rows.stop()

    def _retire(self) -> None:
        """Check the tokens drawn since the last check. Rows that have ended are stored up to their end, and leave."""
        drawn, lengths = self.rows.drawn()
        ends = self._ends(drawn, lengths)
        full = [length if length == self.max_new_tokens else 0 for length in lengths]
        over = [end or length for end, length in zip(ends, full, strict=True)]
        self.seen = lengths
        if not any(over):
            return
        logprobs = self.rows.logprobs()
        for i, (row, end) in enumerate(zip(self.alive, over, strict=True)):
            if end:
                self.ids[row], self.logprobs[row] = drawn[i, :end].tolist(), logprobs[i, :end].clone()
                self.finished[row] = ends[i] > 0
        order = self.rows.keep(torch.tensor(over) == 0).tolist()
        self.alive = [self.alive[i] for i in order]
        self.seen = [self.seen[i] for i in order]

    def _ends(self, drawn: Tensor, lengths: list[int]) -> list[int]:
        """For every row, the number of tokens up to and with the first new one that ends it; 0 if none does."""
        at = torch.arange(drawn.shape[1])
        seen, length = torch.tensor(self.seen)[:, None], torch.tensor(lengths)[:, None]
        suspects = (self.is_eos | self.stops.may_complete)[drawn] & (at >= seen) & (at < length)
        ends = [0] * len(drawn)
        for i, t in suspects.nonzero().tolist():
            if ends[i] == 0:
                ids = drawn[i, : t + 1].tolist()
                if self.is_eos[ids[-1]] or self.stops.find(self.stops.text(ids)) >= 0:
                    ends[i] = t + 1
        return ends

    def completions(self) -> Completions:
        """All completions, padded to the longest row. Called outside of inference mode, since autograd saves some."""
        device = self.sampler.policy.device
        lengths = torch.tensor([len(row) for row in self.ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        completion_ids = torch.zeros(mask.shape, dtype=torch.long)
        completion_ids[mask] = torch.tensor([token for row in self.ids for token in row])
        logprobs = torch.zeros(mask.shape, dtype=self.logprobs[0].dtype)
        logprobs[mask] = torch.cat(self.logprobs)
        without_eos = [row[:-1] if self.is_eos[row[-1]] else row for row in self.ids]
        texts = [self.stops.cut(row) for row in without_eos]
        moved = (x.to(device) for x in (completion_ids, mask, self.finished, logprobs))
        return Completions(*moved, texts)
