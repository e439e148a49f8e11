"""Check the options of the algorithm: find those that have no effect, the opposite effect, or not their paper's effect.

Each check is a function `(config, facts) -> Iterator[Finding]`. `ALGORITHM_CHECKS` lists them, and `diagnose.py` runs
them. Left out: whether a value is the best one, and impossible values (`config.py` refuses them).
"""

import math
from collections.abc import Iterator

from grpo.config import Config
from grpo.doctor import memory
from grpo.doctor.facts import Facts
from grpo.doctor.finding import Finding


def several_updates(c: Config, facts: Facts) -> Iterator[Finding]:
    """Updates without a ratio, and bounds that never act."""
    updates = memory.updates_per_step(c)
    if updates == 1:
        if c.kl_stop < math.inf:
            yield Finding(
                "warning",
                f"kl_stop {c.kl_stop:g} with one update per step",
                "It is looked at before each update of a step but the first, so it never acts.",
                "Several updates per step (num_epochs or minibatch_size), or kl_stop inf.",
            )
        return
    if c.loss == "reinforce":
        yield Finding(
            "warning",
            f"loss reinforce makes {updates} updates of each step's completions",
            "It has no ratio that corrects for old samples. From the second update on, its gradient is biased.",
            "One update per step (num_epochs 1, minibatch_size 0), or loss grpo.",
        )
    if c.loss in ("gspo", "gspo_token") and min(c.clip_low, c.clip_high) > 0.01:
        yield Finding(
            "warning",
            f"loss {c.loss} with bounds of {c.clip_low:g} and {c.clip_high:g} never clips",
            "Its ratio is a mean over a whole completion, which hardly changes.",
            "clip_low 3e-4 and clip_high 4e-4, as in its paper.",
        )


def weighting(c: Config, facts: Facts) -> Iterator[Finding]:
    """Losses and advantages whose paper uses another denominator."""
    if c.loss in ("gspo", "gspo_token", "gmpo") and c.weighting != "sequence_mean":
        yield Finding(
            "warning",
            f"loss {c.loss} with weighting {c.weighting}",
            "It gives one value per completion: so weighted, long ones count more than short ones.",
            "weighting sequence_mean, as in its paper.",
        )
    if c.loss == "cispo" and c.weighting != "token_mean":
        yield Finding(
            "warning",
            f"loss cispo with weighting {c.weighting}",
            "Its objective is a mean over all tokens. Here a token counts by its completion's length.",
            "weighting token_mean, as in its paper.",
        )
    if c.advantage == "dr_grpo" and c.weighting == "sequence_mean":
        yield Finding(
            "note",
            "advantage dr_grpo with weighting sequence_mean",
            "This is half of Dr. GRPO. A long wrong answer is still punished less per token.",
            "weighting constant_length.",
        )


def learning_rate(c: Config, facts: Facts) -> Iterator[Finding]:
    """Learning rates that do not suit float32 master weights and the size of the model.

    In each update AdamW changes every weight by about the learning rate, whatever the size of the gradient. The
    neighbours of a bfloat16 weight of 0.02 are 6e-5 to 1e-4 away, and much smaller changes are rounded away. Recipes
    for bfloat16 master weights therefore use 1e-5 and more. Master weights here are float32, so even 1e-6 takes effect.
    """
    updates = c.num_steps * memory.updates_per_step(c)
    large = facts.sizes.parameters >= 1e8
    if c.learning_rate == 0:
        yield Finding("sure", "learning_rate is 0", "Nothing is learned.", "1e-6 for a model of 100 million and more.")
    elif c.lora_rank:
        return  # `adapters` looks at it
    elif large and c.learning_rate >= 1e-5:
        yield Finding(
            "sure" if c.learning_rate >= 1e-4 else "warning",
            f"learning_rate {c.learning_rate:g} for {facts.sizes.parameters / 1e6:,.0f} million parameters",
            "Such rates are made for adapters, or for bfloat16 master weights, which round most of an update away. The "
            "master weights here are float32 and take all of it, so the policy is likely to collapse.",
            "learning_rate 1e-6, up to 3e-6.",
        )
    elif updates * c.learning_rate < 1e-5:
        yield Finding(
            "note",
            f"{updates} updates of {c.learning_rate:g} move a weight by about {updates * c.learning_rate:.0e}",
            "Weights are about 1e-2 in size. This shows that everything works, but accuracy will hardly change.",
            "More num_steps, or a higher learning_rate.",
        )


def adapters(c: Config, facts: Facts) -> Iterator[Finding]:
    """Adapters that are too large, or learn at the rate of whole weights: https://thinkingmachines.ai/blog/lora/."""
    learned, rate = memory.trained(c, facts), c.learning_rate
    if c.lora_rank and learned > facts.sizes.rounded / 4:
        yield Finding(
            "warning",
            f"lora_rank {c.lora_rank}: adapters of {learned:,} weights beside the {facts.sizes.rounded:,} of layers",
            "Adapters of this size save little, and rewards teach few bits.",
            "lora_rank 32 or less, or 0 to train all weights.",
        )
    if c.lora_rank and facts.sizes.parameters >= 1e8 and rate > 0 and not 3e-6 <= rate < 3e-4:
        yield Finding(
            "warning" if rate > 1e-5 else "note",
            f"learning_rate {rate:g} with lora_rank {c.lora_rank}",
            "The policy is likely to collapse." if rate > 1e-5 else "Adapters take about ten times the usual rate.",
            "learning_rate 1e-5, up to 1e-4.",
        )


def warmup(c: Config, facts: Facts) -> Iterator[Finding]:
    """A warm-up that is longer than the run."""
    if c.warmup_steps >= c.num_steps:
        yield Finding(
            "warning",
            f"warmup_steps ({c.warmup_steps}) is not below num_steps ({c.num_steps})",
            "The rate reaches its peak in the last step, or never.",
            "warmup_steps of a tenth of num_steps at most.",
        )


def anchor(c: Config, facts: Facts) -> Iterator[Finding]:
    """A correction of what the ratio already contains, or none where it is needed."""
    if c.ratio_to == "sampler" and c.sampler_correction not in ("none", "opsm"):
        yield Finding(
            "warning",
            f"sampler_correction {c.sampler_correction} with ratio_to sampler",
            "The ratio is already against the sampler, so the correction's factor is 1 everywhere.",
            "sampler_correction none, or ratio_to learner.",
        )
    if c.lag and c.ratio_to == "learner" and c.sampler_correction == "none":
        yield Finding(
            "note",
            "lag 1 with ratio_to learner and sampler_correction none",
            "The completions are those of older weights, and nothing corrects for it.",
            "sampler_correction truncate, or ratio_to sampler.",
        )


def kl(c: Config, facts: Facts) -> Iterator[Finding]:
    """A KL penalty, or an option of it, that has no effect."""
    for name in ("kl_target", "reference_sync_every"):
        if getattr(c, name) and c.kl_coef == 0:
            yield Finding(
                "warning",
                f"{name} {getattr(c, name):g} with kl_coef 0",
                "No reference is loaded, so there is no KL, and the option has no effect.",
                f"kl_coef above 0 to begin with, or {name} 0.",
            )
    if c.kl == "k1" and c.kl_in == "loss" and c.kl_coef > 0:
        yield Finding(
            "warning",
            f"kl k1 with kl_coef {c.kl_coef:g}",
            "As a loss, its expected gradient is 0. It adds noise and penalises nothing.",
            "kl k3 or k2, kl_in reward, or kl_coef 0.",
        )


def corrections(c: Config, facts: Facts) -> Iterator[Finding]:
    """Bounds of a token where those of a row are meant, and the other way round."""
    bounds = f"correction_floor {c.correction_floor:g} and correction_cap {c.correction_cap:g}"
    if c.sampler_correction == "mask_row" and (c.correction_floor < 0.9 or c.correction_cap > 1.1):
        yield Finding(
            "warning",
            f"sampler_correction mask_row with {bounds}",
            "Its bounds are of a mean over a completion, which hardly leaves 1. Nothing is masked.",
            "correction_floor 0.999 and correction_cap 1.002, or mask, whose bounds are of a token.",
        )
    if c.sampler_correction == "veto" and (c.correction_floor > 0.01 or c.correction_cap < 100):
        yield Finding(
            "warning",
            f"sampler_correction veto with {bounds}",
            "Its bounds are of a token, and one token outside drops its completion. Most long ones have such a token.",
            "correction_floor 1e-4 and correction_cap inf, or mask, which drops the token alone.",
        )


def entropy(c: Config, facts: Facts) -> Iterator[Finding]:
    """A choice of tokens by a loss that has none."""
    if c.entropy_share < 1 and c.loss in ("gspo", "gmpo"):
        yield Finding(
            "warning",
            f"entropy_share {c.entropy_share:g} with loss {c.loss}",
            "It gives every token the value of its completion. So completions weigh less, and no token is left out.",
            "loss gspo_token or grpo, or entropy_share 1.",
        )


def curriculum(c: Config, facts: Facts) -> Iterator[Finding]:
    """Pass rates that come too late to choose by."""
    drawn = c.num_steps * c.prompts_per_step
    if c.curriculum == "pass_rate" and drawn <= facts.num_train:
        yield Finding(
            "note",
            f"curriculum pass_rate draws {drawn:,} times from {facts.num_train:,} problems",
            "A problem has a pass rate once it was drawn, and few are drawn twice. So there is little to choose by.",
            "More num_steps, fewer problems, or flat_groups refill.",
        )


def idle_processes(c: Config, facts: Facts) -> Iterator[Finding]:
    """Fewer prompts than processes, and shards for a single one."""
    if c.shard != "none" and memory.shards(c, facts) == 1:
        yield Finding(
            "note",
            f"shard {c.shard} with a single process" + (" on each machine" if facts.world_size > 1 else ""),
            "There is none to divide the weights with, so it has no effect.",
            "More processes, started by torchrun, or shard full on several machines.",
        )
    if c.prompts_per_step < facts.world_size:
        yield Finding(
            "warning",
            f"{c.prompts_per_step} prompts on {facts.world_size} processes",
            f"{facts.world_size - c.prompts_per_step} of them have nothing to do.",
            "prompts_per_step a multiple of the number of processes.",
        )


def flat_groups(c: Config, facts: Facts) -> Iterator[Finding]:
    """Options with which all rewards of a group are equal, or their advantages are 0."""
    if c.group_size == 1:
        yield Finding(
            "sure",
            "group_size is 1",
            "A completion is compared with the others of its group. Alone, its advantage is 0 and nothing is learned.",
            "group_size 8 or more.",
        )
    if not any(c.reward_weights):
        means = "All groups are flat, so nothing is learned."
        yield Finding("sure", "every reward_weight is 0", means, "Weights above 0.")
    if c.flat_groups != "keep" and (c.whiten or c.advantage in ("batch_std", "reinforce_pp_baseline")):
        yield Finding(
            "note",
            f"flat_groups {c.flat_groups} with {'whiten' if c.whiten else f'advantage {c.advantage}'}",
            "The std is of all groups that were drawn together, before flat ones are left out. They make it smaller.",
            "flat_groups keep, or an advantage of the group alone, such as grpo.",
        )


def penalties(c: Config, facts: Facts) -> Iterator[Finding]:
    """Rewards that count against a completion."""
    for name, weight in zip(c.rewards, c.reward_weights, strict=True):
        if weight < 0:
            yield Finding(
                "warning",
                f"{name} has weight {weight:g}",
                "The model learns to avoid what this function rewards.",
                "Right for a penalty; otherwise a weight above 0.",
            )


def partial_credit(c: Config, facts: Facts) -> Iterator[Finding]:
    """A large reward for a part of a program's tests, which a constant function can earn."""
    for name, weight in zip(c.rewards, c.reward_weights, strict=True):
        if name == "code.passed" and weight > 0.3:
            yield Finding(
                "warning",
                f"code.passed has weight {weight:g}",
                "A function that returns a constant passes some tests of most problems, and that is easily learned.",
                "code.correctness with weight 1, and code.passed with 0.3 or less beside it.",
            )


def temperature(c: Config, facts: Facts) -> Iterator[Finding]:
    """Sampling far from the model's own distribution."""
    if 0.5 <= c.temperature <= 1.3:
        return
    means = "Much of the text is noise."
    if c.temperature < 1:
        means = "Completions of a group are nearly equal, so most groups are flat."
    yield Finding("warning", f"temperature {c.temperature:g}", means, "temperature 1, or a little lower.")


ALGORITHM_CHECKS = (
    several_updates,
    weighting,
    learning_rate,
    adapters,
    warmup,
    anchor,
    kl,
    corrections,
    entropy,
    curriculum,
    idle_processes,
    flat_groups,
    penalties,
    partial_credit,
    temperature,
)
