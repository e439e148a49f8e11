"""Watch the metrics of a run, and report each kind of trouble once, in a sentence.

A sign is a function of the steps seen so far that returns a sentence or None; `SIGNS` lists them. The thresholds are
rules of thumb, loose enough that a healthy run shows no sign. Left out: what can be known before a run
(`diagnose.py`), what the metrics mean (`docs/metrics.md`), and stopping a run: this file only reports.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from grpo.config import Config
from grpo.doctor.memory import updates_per_step

WINDOW = 5
"""Most signs use the mean over this many steps, so that one odd step causes no alarm."""

SAMPLER_GAP = {"fp64": 1e-6, "fp32": 1e-3, "fp16": 0.02, "bf16": 0.05}
"""By precision: a mean gap, in nats per token, that rounding alone cannot explain."""

Steps = Sequence[Mapping[str, float | None]]


class Watch:
    """Remembers the steps since the run was started or resumed, and reports trouble when it first shows."""

    def __init__(self, config: Config):
        """`config`: of the run, with every `auto` resolved."""
        self.config = config
        self.steps: list[Mapping[str, float | None]] = []
        self.said: set[str] = set()

    def see(
        self, step: int, metrics: Mapping[str, float | None], errors: Sequence[Mapping[str, str]] = ()
    ) -> list[str]:
        """Take in one step.

        Args:
            step: its number, from 1.
            metrics: its metrics.
            errors: for each rank, {reward: its first error} of the rewards that failed there.

        Returns:
            A sentence for each kind of trouble that shows for the first time.
        """
        self.steps.append({**metrics, "step": step})
        sentences = []
        for name, message in chain.from_iterable(of_rank.items() for of_rank in errors):
            if name not in self.said:
                self.said.add(name)
                sentences.append(f"trouble: reward {name} failed for the first time: {message}")
        for sign in SIGNS:
            sentence = None if sign.__name__ in self.said else sign(self.config, self.steps)
            if sentence:
                self.said.add(sign.__name__)
                sentences.append(f"trouble: {sentence}")
        return sentences


def mean(steps: Steps, name: str) -> float:
    """The mean over the steps with a finite value of this name. If there are none, NaN, which compares as False."""
    values = [value for step in steps if (value := step.get(name)) is not None and math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan


def flat_groups(c: Config, steps: Steps) -> str | None:
    """Almost all groups are flat, so there is nothing to learn from."""
    if len(steps) >= WINDOW and mean(steps[-WINDOW:], "reward/flat_groups") > 0.95:
        reward = mean(steps[-WINDOW:], "reward/mean")
        return (
            f"almost all groups were flat for {WINDOW} steps, at a mean reward of {reward:.3g}: nothing is learned. "
            "Near the lowest reward the problems are too hard or the answers are not read (see rollouts/); near the "
            "highest they are solved"
        )
    return None


def invalid_rewards(c: Config, steps: Steps) -> str | None:
    """Reward functions fail."""
    share = mean(steps[-1:], "reward/invalid")
    if share > 0.02:
        return f"{share:.0%} of the rewards failed: they are left out, and what remains is a biased sample"
    return None


def reward_without_accuracy(c: Config, steps: Steps) -> str | None:
    """The reward rises while validation accuracy falls by more than chance explains."""
    evaluated = [i for i, step in enumerate(steps) if step.get("eval/accuracy") is not None]
    if len(evaluated) < 2:
        return None
    last = evaluated[-1]
    best = max(evaluated[:-1], key=lambda i: steps[i]["eval/accuracy"])
    before, after = steps[best]["eval/accuracy"], steps[last]["eval/accuracy"]
    reward = [mean(steps[max(0, i + 1 - WINDOW) : i + 1], "reward/mean") for i in (best, last)]
    if before - after > steps[last]["eval/n"] ** -0.5 and reward[1] > reward[0]:
        return (
            f"the reward rose from {reward[0]:.3g} to {reward[1]:.3g} while accuracy on validation fell from "
            f"{before:.3f} to {after:.3f}: the model games the reward or has memorised the problems; read rollouts/"
        )
    return None


def length(c: Config, steps: Steps) -> str | None:
    """Completions grow or shrink a lot."""
    if len(steps) < 2 * WINDOW:
        return None
    first, last = (mean(part, "completion/length") for part in (steps[:WINDOW], steps[-WINDOW:]))
    if last > 2 * first:
        return (
            f"completions grew from {first:.0f} to {last:.0f} tokens: if accuracy did not grow, long wrong "
            "answers are punished too little (weighting token_mean or constant_length counts each token alike)"
        )
    if last < first / 4:
        return f"completions shrank from {first:.0f} to {last:.0f} tokens: the reward can be earned without working out"
    return None


def truncated(c: Config, steps: Steps) -> str | None:
    """Most completions are cut at max_new_tokens."""
    share = mean(steps[-WINDOW:], "completion/truncated")
    if len(steps) >= WINDOW and share > 0.5:
        follows = "left out of the loss" if c.mask_truncated else "graded as half answers"
        return f"{share:.0%} of the completions are cut at max_new_tokens ({c.max_new_tokens}) and {follows}"
    return None


def kl_at_start(c: Config, steps: Steps) -> str | None:
    """The KL of step 1 is not 0, so the reference differs from the initial policy."""
    first = steps[0].get("policy/kl") or 0.0
    if steps[0].get("step") == 1 and updates_per_step(c) == 1 and abs(first) > 1e-6:
        return f"policy/kl is {first:.2g} in step 1, where it must be 0: policy and reference compute different numbers"
    return None


def kl_runs_away(c: Config, steps: Steps) -> str | None:
    """The policy leaves its reference faster and faster."""
    now, before = mean(steps[-3:], "policy/kl"), mean(steps[-3 - 2 * WINDOW : -3], "policy/kl")
    if now > 1 or (now > 0.1 and len(steps) >= 3 + WINDOW and now > 10 * before):
        return f"the KL to the reference runs away ({now:.2g} nats per token): lower learning_rate, or raise kl_coef"
    return None


def entropy(c: Config, steps: Steps) -> str | None:
    """The policy has become almost certain, or turns to noise."""
    if len(steps) < 2 * WINDOW:
        return None
    first, last = (mean(part, "policy/entropy") for part in (steps[:3], steps[-3:]))
    if last < 0.1 * first:
        return f"the entropy fell from {first:.2g} to {last:.2g} nats: the policy collapses and groups become flat"
    if last > 3 * first:
        return f"the entropy rose from {first:.2g} to {last:.2g} nats: the policy turns to noise; lower learning_rate"
    return None


def sampler_gap(c: Config, steps: Steps) -> str | None:
    """Sampler and learner compute different probabilities."""
    gap = mean(steps[-1:], "policy/sampler_gap_mean")
    if gap > SAMPLER_GAP[c.precision] and not c.lag:  # with a lag it is meant
        return (
            f"sampler and learner differ by {gap:.2g} nats per token, more than rounding in {c.precision} explains: "
            "learning is off-policy without knowing it"
        )
    return None


def clipped(c: Config, steps: Steps) -> str | None:
    """Clipping removes the gradient of many tokens."""
    share = mean(steps[-3:], "policy/clip_fraction")
    if len(steps) >= 3 and c.loss == "grpo" and share > 0.3:
        lower = "use fewer num_epochs, a larger minibatch_size or a lower learning_rate"
        return f"{share:.0%} of the tokens are clipped: {lower}"
    return None


def skipped(c: Config, steps: Steps) -> str | None:
    """An update was skipped because its gradient was not finite."""
    if (steps[-1].get("optim/skipped") or 0) > 0:
        return "an update was skipped, its gradient was not finite: lower learning_rate, or use bf16 instead of fp16"
    return None


SIGNS: tuple[Callable[[Config, Steps], str | None], ...] = (
    *(flat_groups, invalid_rewards, reward_without_accuracy, length, truncated, kl_at_start, kl_runs_away, entropy),
    *(sampler_gap, clipped, skipped),
)
