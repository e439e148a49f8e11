"""Expected gradients as sums over everything that can be drawn, in float64.

First, rewards alone: with rewards of 0 and 1, an advantage rule weights questions, and the weight is a sum over the
number of successes in a group. Then a policy so small that all of its completions and all groups of them can be listed.
It gives the expected gradient and the variance of any choice of functions. Left out: updates of several questions; an
update is one group here.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.advantages import ADVANTAGES, FACTS
from grpo.config import Config
from grpo.corrections import CORRECTIONS
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.objective import objective
from grpo.tables import asked, constants
from grpo.weighting import WEIGHTINGS, count, count_groups

VOCABULARY, EOS, LONGEST = 3, 2, 2
"""Tokens 0, 1 and EOS; a completion has at most two of them."""
RIGHT = 1
"""A completion that holds this token has reward 1, every other one 0."""

# Logits after each prefix: the empty one, 0, and 1. Some ratios between these policies pass the default bounds of
# losses and corrections. The angles that result are near the middle of those of random policies as far apart.
POLICY = torch.tensor([[0.3, -0.4, 0.2], [0.1, -0.9, 0.7], [-0.3, 0.2, 0.5]], dtype=torch.float64)
OLD = POLICY + torch.tensor([[-0.1, 0.0, 0.0], [0.3, 0.1, -0.2], [-0.2, -0.2, -0.2]], dtype=torch.float64)
SAMPLER = POLICY + torch.tensor([[-0.6, 0.2, 0.3], [-0.7, -0.1, 0.9], [0.5, -0.2, -0.8]], dtype=torch.float64)
REFERENCE = POLICY + torch.tensor([[-0.5, 0.9, 0.0], [0.8, 0.0, -0.6], [0.4, -1.0, 0.3]], dtype=torch.float64)

SAMPLINGS = {"on-policy": (POLICY, POLICY), "from an old policy": (OLD, OLD), "by another sampler": (SAMPLER, POLICY)}
"""{how the completions are drawn: (logits of the sampler, of the old policy)}. The policy is always `POLICY`."""


class Choice(NamedTuple):
    """Names of the functions of an objective."""

    advantage: str | None = "rloo"
    """None: there is no reward, and the penalty is all that is learned from."""
    loss: str = "reinforce"
    weighting: str = "constant_length"
    sampler_correction: str = "none"
    kl: str | None = None
    """None: there is no penalty."""


class Completions(NamedTuple):
    """Every completion of the tiny policy; S of them."""

    tokens: Tensor
    """[S,T] int64, 0 behind the end."""
    prefix: Tensor
    """[S,T] int64: the row of the logits that a token is drawn from."""
    mask: Tensor
    """[S,T] bool, False behind the end."""
    rewards: Tensor
    """[S]."""

    def logprobs(self, logits: Tensor) -> Tensor:
        """[S,T] in nats under logits [P,V], 0 behind the end."""
        return logits.log_softmax(-1)[self.prefix, self.tokens].where(self.mask, 0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[S] under logits [P,V]; they add up to 1."""
        return self.logprobs(logits).sum(-1).exp()


class Gradient(NamedTuple):
    """The gradient step of an update, over all groups that can be drawn."""

    mean: Tensor
    """[P*V], downhill: what gradient descent adds to the logits at learning rate 1."""
    variance: float
    """The trace of its covariance."""


def question_weight(rule: Callable, group_size: int, p: float, config: Config) -> float:
    """The weight w of a question: with rewards of 0 and 1, the expected gradient is exactly w(p) times that of p.

    w = E[K A+ / p - (N - K) A- / (1 - p)] / N with K ~ Bin(N, p) successes, whose advantage is A+; A- of a failure. It
    holds on-policy, where no weight depends on length, such as `reinforce` and `constant_length`. So a question's
    integral of w(p) is maximised: with w = 1 its mean reward.

    Args:
        rule: an entry of `ADVANTAGES`. group_size: N. p: the probability of a success, between 0 and 1.
        config: the constants of the rule.
    """
    successes = torch.arange(group_size + 1)
    rewards = (torch.arange(group_size) < successes[:, None]).double()
    advantages = _advantages(rule, rewards, torch.ones_like(rewards), config)
    of_successes, of_failures = (advantages * rewards).sum(-1), (advantages * (1 - rewards)).sum(-1)
    chances = [math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k) for k in successes.tolist()]
    weights = (of_successes / p - of_failures / (1 - p)) / group_size
    return (torch.tensor(chances, dtype=torch.float64) * weights).sum().item()


def refill(group_size: int, p: float) -> float:
    """The factor on a question's weight if groups of equal rewards are drawn again: 1 / P(not all rewards equal).

    It holds for rules whose advantages are 0 in such groups.
    """
    return 1 / (1 - p**group_size - (1 - p) ** group_size)


def completions() -> Completions:
    """All completions of the tiny policy."""
    prefixes, ended = [()], []
    for prefix in prefixes:  # grows while it is read
        for longer in [(*prefix, token) for token in range(VOCABULARY)]:
            over = longer[-1] == EOS or len(longer) == LONGEST
            (ended if over else prefixes).append(longer)
    tokens, rows = torch.zeros(2, len(ended), LONGEST, dtype=torch.long)
    for row, completion in enumerate(ended):
        tokens[row, : len(completion)] = torch.tensor(completion)
        rows[row, : len(completion)] = torch.tensor([prefixes.index(completion[:t]) for t in range(len(completion))])
    lengths = torch.tensor([len(completion) for completion in ended])
    rewards = torch.tensor([RIGHT in completion for completion in ended]).double()
    return Completions(tokens, rows, torch.arange(LONGEST) < lengths[:, None], rewards)


class Groups:
    """All groups of one size that can be drawn from the tiny policy. The order within a group does not matter."""

    def __init__(self, size: int) -> None:
        """List the groups of `size` completions."""
        self.all = completions()
        chosen = itertools.combinations_with_replacement(range(len(self.all.rewards)), size)
        self.index = torch.tensor(list(chosen))  # [groups,N]
        times = torch.nn.functional.one_hot(self.index, len(self.all.rewards)).sum(1).double()
        self.orders = (math.lgamma(size + 1) - (times + 1).lgamma().sum(-1)).exp().round()
        self.slopes = torch.autograd.functional.jacobian(self.all.logprobs, POLICY).flatten(-2)  # [S,T,P*V]
        # Many groups have the same rewards and lengths. Advantages and token weights depend on nothing else.
        seen = torch.stack([self.all.rewards, self.all.mask.sum(-1)], -1)[self.index]
        self.kinds, self.kind = torch.unique(seen, dim=0, return_inverse=True)

    def gradient(self, choice: Choice, sampling: str, config: Config) -> Gradient:
        """What an update of one group does to the logits of `POLICY`.

        Args:
            choice: what is optimised; with a penalty, its `kl_coef` is 1.
            sampling: a key of `SAMPLINGS`.
            config: the constants of the functions.
        """
        sampler, old = SAMPLINGS[sampling]
        steps = torch.einsum("gnt,gntd->gd", -self._of_tokens(choice, sampler, old, config), self.slopes[self.index])
        chances = self.orders * self.all.probabilities(sampler)[self.index].prod(-1)
        mean = chances @ steps
        return Gradient(mean, (chances @ (steps - mean).square().sum(-1)).item())

    def _of_tokens(self, choice: Choice, sampler: Tensor, old: Tensor, config: Config) -> Tensor:
        """[groups,N,T] derivative of each group's loss in the log-probabilities of its tokens."""
        rewards, lengths = self.kinds.unbind(-1)
        advantages = torch.zeros_like(rewards)
        if choice.advantage is not None:
            advantages = _advantages(ADVANTAGES[choice.advantage], rewards, lengths, config)
        weights = _token_weights(WEIGHTINGS[choice.weighting], lengths)[self.kind]  # [groups,N,T]
        loss, correction = LOSSES[choice.loss], CORRECTIONS[choice.sampler_correction]
        rows = self.index.flatten()
        logprobs = self.all.logprobs(POLICY)[rows].requires_grad_()
        found = objective(
            logprobs,
            self.all.logprobs(sampler if config.ratio_to == "sampler" else old)[rows],
            self.all.logprobs(sampler)[rows],
            None if choice.kl is None else self.all.logprobs(REFERENCE)[rows],
            advantages[self.kind].flatten(),
            self.all.mask[rows],
            loss=loss,
            constants=constants(loss, config),
            correction=correction,
            bounds=constants(correction, config, "sampler_correction"),
            kl=KL.get(choice.kl),
            kl_coef=1.0,
            kl_in=config.kl_in,
        )
        total = (weights.flatten(0, 1) * found.per_token_loss).sum()
        return torch.autograd.grad(total, logprobs)[0].view_as(weights)


def reward_gradient() -> Tensor:
    """[P*V] gradient of the expected reward of `POLICY`."""
    every = completions()
    return _gradient(lambda logits: every.probabilities(logits) @ every.rewards)


def kl_gradient(prefixes_given: bool) -> Tensor:
    """[P*V] gradient of -KL(POLICY || REFERENCE), which a penalty is to follow.

    Args:
        prefixes_given: the KL of each token given its prefix, added up over the tokens that are drawn; that a token
            changes later prefixes is left out. Otherwise the KL of whole completions.
    """
    every = completions()

    def of_tokens(logits: Tensor) -> Tensor:
        logprobs, drawn = logits.log_softmax(-1), every.probabilities(POLICY)[:, None] * every.mask
        visits = torch.zeros_like(logits[:, 0]).index_add(0, every.prefix.flatten(), drawn.flatten())
        return -visits @ (logprobs.exp() * (logprobs - REFERENCE.log_softmax(-1))).sum(-1)

    def of_completions(logits: Tensor) -> Tensor:
        log_ratio = (every.logprobs(logits) - every.logprobs(REFERENCE)).sum(-1)
        return -every.probabilities(logits) @ log_ratio

    return _gradient(of_tokens if prefixes_given else of_completions)


def compare(mean: Tensor, exact: Tensor) -> tuple[float, float]:
    """(length of `mean` in lengths of `exact`, the angle between them in degrees; NaN if `mean` is 0)."""
    length, unit = mean.norm() / exact.norm(), exact / exact.norm()
    if length < 1e-12:
        return 0.0, math.nan
    along = mean @ unit
    return length.item(), math.degrees(math.atan2((mean - along * unit).norm().item(), along.item()))


def _gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.autograd.functional.jacobian(function, POLICY).flatten()


def _advantages(rule: Callable, rewards: Tensor, lengths: Tensor, config: Config) -> Tensor:
    """[groups,N] advantages of rewards [groups,N]. Each group is a step of its own, of lengths [groups,N] in tokens."""
    fixed = constants(rule, config, "advantage", given=FACTS)
    of_groups = zip(rewards[:, None], lengths[:, None], strict=True)
    return torch.cat([rule(group, **asked(rule, {"lengths": long}), **fixed) for group, long in of_groups])


def _token_weights(weighting: Callable, lengths: Tensor) -> Tensor:
    """[groups,N,T] token weights for lengths [groups,N] in tokens. Each group is an update of its own."""
    weights = []
    for mask in torch.arange(LONGEST) < lengths[..., None]:
        num_tokens, num_sequences = count(mask)
        num_groups, group_tokens = count_groups(mask, len(mask))
        facts = {"num_tokens": num_tokens, "num_sequences": num_sequences, "max_new_tokens": LONGEST}
        facts |= {"num_groups": num_groups, "group_tokens": group_tokens, "dtype": torch.float64}
        weights.append(weighting(mask, **asked(weighting, facts)))
    return torch.stack(weights)
