"""The rollout of one step on one rank: it draws prompts, completes and rewards them, and computes advantages.

A step is rollout plus learning; learning is in `update.py`. The rollout depends only on the policy, (seed, step) and,
under a curriculum, on pass rates that a checkpoint keeps. So a resumed run continues without replaying earlier steps:

- `Collector.draw` computes the prompts of a step from its number, and from pass rates if it is asked to.
- Prompt i of a step belongs to rank i mod world size.
- The sampler's random numbers are hashes of counters, so no state is stored.

A group is flat if all its advantages are 0. `Collector.collect` may draw other prompts instead, and `Collector.choose`
may leave flat groups out of learning. Left out: which problems are drawn (`prompts/`), and a memory of earlier steps.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from data.problem import Problem
from grpo import distributed
from grpo.advantages import ADVANTAGES, FACTS, combine, weighted_sum, whiten
from grpo.batch import Batch, Completions, no_completions
from grpo.config import Config
from grpo.dataloader import choose_training, encode_all, refuse_unequal, stop_strings
from grpo.metrics import Sums
from grpo.policy import refuse_beyond_positions
from grpo.prompts.curriculum import count, draw_by_pass_rate, needed, shares
from grpo.prompts.order import draw_prompts
from grpo.sampler import Sampler
from grpo.tables import asked, constants, lookup
from grpo.tree import trunk_length
from rewards.runner import RewardRunner


@dataclass
class Drawn:
    """The n prompts of a step that belong to this rank, and their n * G completions."""

    problems: list[Problem]
    """n problems."""
    completions: Completions
    """n * G completions."""
    batch: Batch
    """The same completions with their prompts. There are no advantages yet; whatever else is filled in is kept."""


@dataclass
class Rollout:
    """What was sampled, its rewards and advantages, and the batch that learning reads."""

    problems: list[Problem]
    """n problems."""
    completions: Completions
    """n * G completions."""
    reward_terms: Tensor
    """[K,n,G] unweighted; NaN where a reward function failed, -inf where it does not apply."""
    rewards: Tensor
    """[n,G] weighted sum of the terms, which is what is optimised; not finite where a reward failed."""
    valid: Tensor
    """[n,G] bool: False where a reward failed, none applies, or the sum is too large for the dtype."""
    advantages: Tensor
    """[n,G]."""
    batch: Batch
    """What learning reads. Rows that are not valid, or truncated under `mask_truncated`, have an all-False mask."""

    def flat(self) -> Tensor:
        """[n] bool: groups whose advantages are all 0. Their surrogate has no gradient."""
        return (self.advantages == 0).all(-1)

    def select(self, prompts: list[int]) -> "Rollout":
        """Some of the n prompts with all that belongs to them, in the given order. Advantages stay as they are."""
        return Rollout(
            problems=[self.problems[i] for i in prompts],
            completions=self.completions.select(prompts, self.batch.group_size),
            reward_terms=self.reward_terms[:, prompts],
            rewards=self.rewards[prompts],
            valid=self.valid[prompts],
            advantages=self.advantages[prompts],
            batch=self.batch.select(prompts),
        )

    @staticmethod
    def join(parts: Sequence["Rollout"]) -> "Rollout":
        """The prompts of all parts, one part after the other."""
        return Rollout(
            problems=[problem for part in parts for problem in part.problems],
            completions=Completions.join([part.completions for part in parts]),
            reward_terms=torch.cat([part.reward_terms for part in parts], dim=1),
            rewards=torch.cat([part.rewards for part in parts]),
            valid=torch.cat([part.valid for part in parts]),
            advantages=torch.cat([part.advantages for part in parts]),
            batch=Batch.join([part.batch for part in parts]),
        )


class Collector:
    """Makes the rollout of a step. Built once per run; holds the training set, the sampler and the reward runner."""

    def __init__(
        self,
        config: Config,
        problems: list[Problem],
        sampler: Sampler,
        runner: RewardRunner,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ):
        """Look at all prompts, and look up the advantage function that the config names.

        Args:
            config: the run's.
            problems: to learn from.
            sampler: completes the prompts.
            runner: rewards the completions.
            prompt_ids: the problems' prompts in tokens; None: they are tokenized here.

        Raises:
            ValueError: a prompt is too long, there is no problem, ranks have different problems, `advantage` is
                unknown, or a constant of it has no option.
        """
        refuse_unequal(problems)
        if not problems:
            raise ValueError(f"data: {config.data!r} has no training problem")
        self.config, self.sampler, self.runner = config, sampler, runner
        self.advantage = advantage_of(config)
        self.stop = stop_strings(problems, config.chat)
        if prompt_ids is None:
            prompt_ids = encode_all(problems, sampler.tokenizer, config.chat)
        self.problems, self.prompt_ids = choose_training(problems, prompt_ids, config)
        refuse_beyond_positions(sampler.positions, self.prompt_ids, config.max_new_tokens, "max_new_tokens")
        self.trunk_ids = self.prompt_ids[0][: trunk_length(self.prompt_ids)]
        """The trunk: the token prefix that all prompts of the run share, such as few-shot exemplars."""

    def collect(
        self,
        step: int,
        clock: Callable[[str], AbstractContextManager] = lambda phase: nullcontext(),
        pass_rates: Mapping[int, float] | None = None,
    ) -> Rollout:
        """All that is drawn in a step: its prompts and, under `flat_groups: refill`, further ones. A collective call.

        The number of refills depends on rewards alone, which all ranks know of all groups.

        Args:
            step: counted from 1.
            clock: measures the phases `rollout` and `reward`; each is the sum over all draws.
            pass_rates: of the problems, before the step; see `draw`.
        """
        parts: list[Rollout] = []
        learnable = 0
        for refill in range(1 + self.config.max_refills):
            with clock("rollout"):
                drawn = self.sample(step, refill, pass_rates)
            with clock("reward"):
                parts.append(self.reward(drawn))
                if self.config.flat_groups != "refill":
                    return parts[0]
                learnable += len(learnable_groups(parts[-1]))
            if learnable >= self.config.prompts_per_step:
                break
        return Rollout.join(parts)

    def choose(self, rollout: Rollout, sums: Sums) -> Rollout:
        """What is learned from: all groups, or the first `prompts_per_step` that are not flat. A collective call.

        Args:
            rollout: all that was drawn.
            sums: the step's metrics; what was drawn and left out is counted there.
        """
        config, numbers = self.config, rollout.batch.prompt_index
        if config.flat_groups == "keep":
            return rollout
        kept = set(learnable_groups(rollout)[: config.prompts_per_step])
        chosen = rollout.select([i for i, number in enumerate(numbers) if number in kept])
        sums.maximum("rollout/refills", max(numbers, default=0) // config.prompts_per_step)
        sums.add("rollout/dropped_groups", len(rollout.valid) - len(chosen.valid))
        return chosen

    def draw(self, step: int, refill: int = 0, pass_rates: Mapping[int, float] | None = None) -> list[int]:
        """The N problems of a step or of a refill, as indices. `pass_rates`: a curriculum prefers problems by them."""
        config, problems, N = self.config, len(self.problems), self.config.prompts_per_step
        if config.curriculum == "none":
            return draw_prompts(problems, N, config.seed, step, refill)
        return draw_by_pass_rate(pass_rates or {}, problems, config.pool_weights, N, config.seed, step, refill)

    def pass_rates(self, rollout: Rollout, step: int, known: dict[int, float], sums: Sums) -> dict[int, float]:
        """The problems' pass rates after a step, from all that was drawn in it. A collective call."""
        config = self.config
        if config.curriculum == "none":
            return known
        judged = rollout.reward_terms[config.rewards.index(config.eval_correct)]
        found = shares(judged, needed(config), rollout.batch.prompt_index)
        draws = {refill: self.draw(step, refill, known) for refill in {i // config.prompts_per_step for i in found}}
        after = known | {draws[i // config.prompts_per_step][i % config.prompts_per_step]: found[i] for i in found}
        count(after, len(self.problems), sums)
        return after

    def sample(self, step: int, refill: int = 0, pass_rates: Mapping[int, float] | None = None) -> Drawn:
        """Draw the step's prompts, or those of a refill, and sample completions of those that belong to this rank.

        Prompt i of refill k has the number k * N + i in the step. So its random numbers are its own.
        """
        config, N = self.config, self.config.prompts_per_step
        chosen = dict(enumerate(self.draw(step, refill, pass_rates), start=refill * N))
        index = [i for i in chosen if i % distributed.world_size() == distributed.rank()]
        prompt_ids = [self.prompt_ids[chosen[i]].tolist() for i in index]
        if index:
            completions = self.sampler.generate(
                prompt_ids,
                group_size=config.group_size,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=config.seed,
                step=step,
                prompt_index=index,
                stop=self.stop,
                trunk_tokens=len(self.trunk_ids),
            )
        else:
            completions = no_completions(self.sampler.policy.device)
        problems = [self.problems[chosen[i]] for i in index]
        return Drawn(problems, completions, completions.batch(prompt_ids, prompt_index=index))

    def reward(self, drawn: Drawn) -> Rollout:
        """Reward the completions, and compute what follows from rewards. Collective as `judge`."""
        config, completions = self.config, drawn.completions
        n, G, K = len(drawn.problems), config.group_size, len(config.rewards)
        of_row = [problem for problem in drawn.problems for _ in range(G)]
        scored = self.runner.score(completions.texts, of_row, completions.told(config.max_new_tokens))
        values = [[torch.nan if value is None else value for value in term] for term in scored]
        values = torch.tensor(values, dtype=torch.float64)
        reward_terms = values.to(completions.sampling_logprobs.dtype)
        reward_terms[reward_terms.isinf() & values.isfinite()] = torch.nan  # too large for the dtype
        reward_terms = reward_terms.view(K, n, G)
        judged = judge(config, self.advantage, drawn.batch, completions.finished, reward_terms)
        return Rollout(drawn.problems, completions, reward_terms, *judged)


def advantage_of(config: Config) -> Callable[..., Tensor]:
    """The advantage function that the config names, with its constants. Raises ValueError as `Collector`."""
    function = lookup(ADVANTAGES, config.advantage, "advantage")
    return partial(function, **constants(function, config, "advantage", given=FACTS))


def judge(config: Config, advantage: Callable, batch: Batch, finished: Tensor, reward_terms: Tensor) -> tuple:
    """What follows from a draw's reward terms [K,n,G]: `rewards`, `valid`, `advantages` and `batch` of a `Rollout`.

    `advantage` is that of `advantage_of`. The mask of `batch` has all sampled tokens. `finished` is [n*G]. Collective
    where advantages depend on the whole step.
    """
    nothing = reward_terms.isneginf()
    rewards = weighted_sum(reward_terms.masked_fill(nothing & ~nothing.all(0), 0), config.reward_weights)
    valid = rewards.isfinite()  # not where a term failed, none applies, or the sum is too large for the dtype
    lengths = batch.completion_mask.sum(1).view(valid.shape).to(rewards.device)
    facts = asked(advantage, {"lengths": lengths, "sum_over_ranks": distributed.all_sum})
    advantages = combine(reward_terms, config.reward_weights, advantage, config.combine, valid, **facts)
    if config.whiten:
        advantages = whiten(advantages, valid, sum_over_ranks=distributed.all_sum)
    keep = valid.view(-1).to(finished.device) & (finished if config.mask_truncated else True)
    mask = batch.completion_mask & keep[:, None]
    batch = replace(batch, completion_mask=mask, advantages=advantages.view(-1).to(finished.device))
    return rewards, valid, advantages, batch


def learnable_groups(rollout: Rollout) -> list[int]:
    """The numbers in the step of the groups that are not flat, on all ranks, sorted. A collective call."""
    here = [i for i, flat in zip(rollout.batch.prompt_index, rollout.flat().tolist(), strict=True) if not flat]
    return sorted(number for rank in distributed.gather_objects(here) for number in rank)
