"""Randomness without state, and one token drawn from logits. The decoding loop is in `generate.py`.

`uniforms` hashes a counter to a number in [0, 1): the same (seed, purpose, step, prompt, sample, token) gives the same
number on any device, in any batch layout, at any world size and after any resume. `sample` turns logits and such
numbers into tokens by inverse CDF. Left out on purpose: top-k, top-p and min-p, which sample from another distribution
than the one that is learned. Nothing here reads a value back to the host: all of it can run inside a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PURPOSES = {"train": 1, "evaluation": 2}

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # constants of splitmix64 as signed 64-bit integers
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64

BLOCK = 512
"""Entries of the vocabulary summed before the cumulative sum goes on in float64."""


@dataclass(frozen=True)
class Draw:
    """What names the uniforms of a `generate`, beside prompt, sample and token; and the temperature."""

    seed: int
    purpose: str
    step: int
    temperature: float


def uniforms(
    seed: int, purpose: str, step: int | Tensor, prompt: int | Tensor, sample: int | Tensor, token: int | Tensor
) -> Tensor:
    """Counter-based uniforms: h <- mix(h ^ mix(word)) over the six words; u = the upper 53 bits of h, times 2^-53.

    mix is the finalizer of splitmix64 (Steele, Lea, Flood, https://doi.org/10.1145/2660193.2660195); hashing a counter
    instead of keeping a state is the idea of Random123 (Salmon et al., https://doi.org/10.1145/2063384.2063405). Each
    word is mixed before it goes in, so that no two streams are shifted copies of each other.

    Args:
        seed: of the run, 0 <= seed < 2^63.
        purpose: a key of `PURPOSES`, so that evaluating does not reuse the draws of training.
        step, prompt, sample, token: counters from 0: step of the run, prompt in the step over all ranks, completion in
            its group, position in the completion. Ints or int64 tensors, broadcast against each other.

    Returns:
        float64 in [0, 1), of the broadcast shape, on the device of the tensors.
    """
    return uniforms_at(streams(seed, purpose, step, prompt, sample), token)


def streams(seed: int, purpose: str, step: int | Tensor, prompt: int | Tensor, sample: int | Tensor) -> Tensor:
    """What the uniforms of a completion have in common: the hash of all their words but the last.

    Args:
        seed, purpose, step, prompt, sample: as for `uniforms`.

    Returns:
        int64, of the broadcast shape, for `uniforms_at`.
    """
    state = torch.zeros((), dtype=torch.int64)
    for word in (seed, PURPOSES[purpose], step, prompt, sample):
        state = _hash(state, word)
    return state


def uniforms_at(stream: Tensor, token: int | Tensor) -> Tensor:
    """`uniforms` of completions whose `streams` are known.

    Args:
        stream: int64, of `streams`.
        token: positions from 0, broadcast against them.

    Returns:
        float64 in [0, 1), of the broadcast shape.
    """
    return _shift_right(_hash(stream, token), 11).double() * 2.0**-53


def block_masses(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How likely each block of the vocabulary is.

    Args:
        logits: [B,V], float32 or float64.
        temperature: divides them; 0 reads as 1.

    Returns:
        highest [B,1], the largest logit, and mass [B,ceil(V / BLOCK)] float64, the sums of
        exp((logits - highest) / temperature) over each `BLOCK` of entries.
    """
    vocabulary = logits.shape[-1]
    highest = logits.amax(-1, keepdim=True)
    # One buffer, exponentiated in place: at this size, allocating costs more than computing.
    mass = logits.new_empty(len(logits), -(-vocabulary // BLOCK) * BLOCK)
    mass[:, vocabulary:] = -torch.inf
    torch.sub(logits, highest, out=mass[:, :vocabulary])
    if temperature not in (0, 1):
        mass.div_(temperature)
    return highest, mass.exp_().unflatten(-1, (-1, BLOCK)).sum(-1).double()


@torch.no_grad()
def sample(
    logits: Tensor, uniforms: Tensor, temperature: float, masses: Callable[..., tuple[Tensor, Tensor]] = block_masses
) -> tuple[Tensor, Tensor]:
    """One token per row: the first whose cumulative probability under softmax(logits / temperature) exceeds u.

    A float32 cumulative sum does not see tokens below 6e-8, together a noticeable share of a large vocabulary. Here the
    sums of blocks are accumulated in float64, then the entries of the one block that u falls into: each token has its
    probability up to a relative 1e-5 (the rounding of a float32 exponential and block sum), however small it is.

    Args:
        logits: [B,V], or [1,V] to draw B times from one row; not changed. Half precision is read as float32.
        uniforms: [B] float64 in [0, 1).
        temperature: divides the logits; 0 = greedy, which ignores `uniforms` and reports logprobs at temperature 1.
        masses: `block_masses`, or what computes the same.

    Returns:
        ids [B] int64, never of probability 0, and logprobs [B] = log_softmax(logits / temperature) at ids, float32
        (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows, vocabulary = len(uniforms), logits.shape[-1]
    highest, block_mass = masses(logits, temperature)
    if temperature == 0:
        ids = logits.argmax(-1, keepdim=True).expand(rows, 1)
    else:
        block, rest = _invert(block_mass, uniforms[:, None])
        entries = block * BLOCK + torch.arange(BLOCK, device=logits.device)
        scores = logits.expand(rows, -1).gather(1, entries.clamp(max=vocabulary - 1)) - highest
        mass = scores.div_(temperature).exp_().masked_fill_(entries >= vocabulary, 0)
        ids = block * BLOCK + _invert(mass.double(), rest)[0]
    score = (logits.expand(rows, -1).gather(-1, ids) - highest) / (temperature or 1.0)
    return ids.squeeze(-1), (score - block_mass.sum(-1, keepdim=True).log().to(score.dtype)).squeeze(-1)


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The first index whose cumulative mass exceeds u * total, and how far into its own mass that point is, in [0, 1).

    Entries without mass are taken out of the comparison and the total is the largest cumulative sum, so u = 0,
    u = 1 - 2^-53 and a parallel cumulative sum that is off by a rounding never lead to an entry of mass 0.

    Args:
        mass: [B,n] or [1,n] float64, >= 0. u: [B,1] float64 in [0, 1).

    Returns:
        index [B,1] int64, rest [B,1] float64.
    """
    cumulative = mass.cumsum(-1)
    cumulative = torch.where(mass > 0, cumulative, 0)
    target = u * cumulative.amax(-1, keepdim=True)
    index = (cumulative > target).to(torch.uint8).argmax(-1, keepdim=True)  # argmax: the first of the equal ones
    own = mass.expand(len(u), -1).gather(-1, index)
    before = cumulative.expand(len(u), -1).gather(-1, index) - own
    return index, ((target - before) / own).clamp(0, 1 - 2.0**-53)


def _hash(state: Tensor, word: int | Tensor) -> Tensor:
    """The state after one more word."""
    return _mix(state ^ _mix(torch.as_tensor(word, dtype=torch.int64) + GOLDEN))


def _mix(z: Tensor) -> Tensor:
    """The finalizer of splitmix64, a bijection of 64-bit words; int64 products wrap as unsigned ones do."""
    z = (z ^ _shift_right(z, 30)) * MIX_1
    z = (z ^ _shift_right(z, 27)) * MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: `>>` on int64 copies the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
