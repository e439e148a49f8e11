"""Draws tokens from logits, with random numbers that need no state.

`uniforms` hashes six counters to a number in [0, 1). The same (seed, purpose, step, prompt, sample, token) gives the
same number on any device, in any batch layout, at any world size and after any resume. `sample` turns logits and these
numbers into tokens by inverse CDF. Nothing here reads a value back to the host, so all of it can run inside a CUDA
graph.

Left out: the decoding loop (`generate.py`). Left out on purpose: top-k, top-p and min-p, which sample from a different
distribution than the one that is learned.
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
"""Entries of the vocabulary in a block. Blocks are summed first, and the cumulative sum over blocks is float64."""


@dataclass(frozen=True)
class Draw:
    """What all draws of one `generate` have in common: three of the six words that `uniforms` hashes; temperature."""

    seed: int
    purpose: str
    step: int
    temperature: float


def uniforms(
    seed: int, purpose: str, step: int | Tensor, prompt: int | Tensor, sample: int | Tensor, token: int | Tensor
) -> Tensor:
    """Counter-based uniforms: h <- mix(h ^ mix(word)) over the six words; u = the upper 53 bits of h, times 2^-53.

    mix is the finalizer of splitmix64 (Steele, Lea, Flood, https://doi.org/10.1145/2660193.2660195). Hashing a counter
    instead of keeping a state is the idea of Random123 (Salmon et al., https://doi.org/10.1145/2063384.2063405). Each
    word is mixed before it is hashed in, so that no two streams are shifted copies of each other.

    Args:
        seed: seed of the run, 0 <= seed < 2^63.
        purpose: a key of `PURPOSES`, so that evaluation does not reuse the draws of training.
        step: step of the run.
        prompt, sample, token: counters from 0: prompt in the step over all ranks, completion in its group, position in
            the completion. These and `step` are ints or int64 tensors, broadcast against each other.

    Returns:
        float64 in [0, 1), of the broadcast shape, on the device of the tensors.
    """
    return uniforms_at(streams(seed, purpose, step, prompt, sample), token)


def streams(seed: int, purpose: str, step: int | Tensor, prompt: int | Tensor, sample: int | Tensor) -> Tensor:
    """The part of the hash that all uniforms of a completion share: that of all words but the last, the token.

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
    """The same numbers as `uniforms`, from hashes that `streams` has computed.

    Args:
        stream: int64, the result of `streams`.
        token: positions from 0, broadcast against `stream`.

    Returns:
        float64 in [0, 1), of the broadcast shape.
    """
    return _shift_right(_hash(stream, token), 11).double() * 2.0**-53


def block_masses(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How likely each block of the vocabulary is.

    Args:
        logits: [B,V], float32 or float64.
        temperature: divides the logits; 0 is read as 1.

    Returns:
        highest [B,1], the largest logit, and mass [B,ceil(V / BLOCK)] float64, the sums of
        exp((logits - highest) / temperature) over each block of `BLOCK` entries.
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
    """Draw one token per row: the first whose cumulative probability under softmax(logits / temperature) exceeds u.

    A float32 cumulative sum loses tokens with a probability below 6e-8. In a large vocabulary they are a noticeable
    share together. So the sums of blocks are accumulated in float64, and then the entries of the block that u falls
    into. Each token is drawn with its probability up to a relative error of 1e-5, however small it is. This error comes
    from rounding in float32 exponentials and block sums.

    Args:
        logits: [B,V], or [1,V] to draw B times from one row; not changed. Half precision is converted to float32.
        uniforms: [B] float64 in [0, 1).
        temperature: divides the logits. 0 means greedy, which ignores `uniforms` and returns logprobs at temperature 1.
        masses: `block_masses`, or another function that computes the same.

    Returns:
        ids [B] int64, never a token of probability 0, and logprobs [B] = log_softmax(logits / temperature) at ids,
        float32 (float64 for float64 logits).
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
    """Invert the CDF: the first index whose cumulative mass exceeds u * total.

    An entry of mass 0 is never returned, even for u = 0 or u = 1 - 2^-53, or if a parallel cumulative sum is off by a
    rounding. For this, entries without mass are left out of the comparison, and the total is the largest cumulative
    sum.

    Args:
        mass: [B,n] or [1,n] float64, >= 0.
        u: [B,1] float64 in [0, 1).

    Returns:
        index [B,1] int64, and rest [B,1] float64 in [0, 1): how far into the entry's own mass u * total lies.
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
