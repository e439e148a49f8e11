"""Checks of the options of the algorithm: what has no effect, the opposite one, or another one than its paper's.

Each is `(config, facts) -> Iterator[Finding]`, listed in `ALGORITHM_CHECKS` and run by `doctor.py`. Left out:
whether a value is the best one, and what can not be (`config.py` refuses it).
"""

from collections.abc import Iterator

from grpo.config import Config
from grpo.doctor import memory
from grpo.doctor.facts import Facts, Finding
from grpo.losses import CLIPPING


def group(c: Config, facts: Facts) -> Iterator[Finding]:
    """Groups too small to compare."""
    if c.group_size == 1:
        yield Finding(
            "sure",
            "group_size is 1",
            "A completion is compared with the others of its group: alone, its advantage is 0 and nothing is learned.",
            "group_size 8 or more.",
        )
    elif c.group_size < 4:
        flat = "; with advantage grpo a group of two is always +0.7 and -0.7 or flat" if c.group_size == 2 else ""
        yield Finding(
            "note",
            f"group_size is {c.group_size}",
            f"The baseline is a mean of few, and most groups of a hard or easy problem are flat{flat}.",
            "group_size 8, and fewer prompts_per_step for the same cost.",
        )


def clipping(c: Config, facts: Facts) -> Iterator[Finding]:
    """Bounds that never act, or always."""
    several = memory.updates_per_step(c) > 1
    if c.loss == "reinforce" and several:
        yield Finding(
            "warning",
            f"loss reinforce makes {memory.updates_per_step(c)} updates of each step's completions",
            "It has no ratio: from the second update on, its gradient is that of another policy than the current one.",
            "One update per step (num_epochs 1, minibatch_size 0), or loss grpo.",
        )
    if c.loss not in CLIPPING:
        return
    if not several:
        yield Finding(
            "note",
            "one update per step: the ratio is exactly 1, and clip_low and clip_high never act",
            f"loss {c.loss} is then plain policy gradient, whatever the bounds; this is right, and on-policy.",
            "Nothing; for clipping to act: num_epochs 2 or a minibatch_size.",
        )
    elif c.loss == "gspo" and min(c.clip_low, c.clip_high) > 0.01:
        yield Finding(
            "warning",
            f"loss gspo with bounds of {c.clip_low:g} and {c.clip_high:g} never clips",
            "Its ratio is a mean over a whole completion, which hardly moves.",
            "clip_low 3e-4 and clip_high 4e-4, as its paper has them.",
        )
    elif 0 in (c.clip_low, c.clip_high) and c.loss != "cispo":
        yield Finding(
            "warning",
            f"clip_low is {c.clip_low:g} and clip_high {c.clip_high:g}",
            "With a bound at the ratio 1 every token on that side loses its gradient from the second update on.",
            "clip_low 0.2, clip_high 0.2 to 0.28.",
        )


def loss_and_weighting(c: Config, facts: Facts) -> Iterator[Finding]:
    """Names whose paper has them with another denominator."""
    meant = {"gspo": "sequence_mean", "cispo": "token_mean"}.get(c.loss)
    if meant and c.weighting != meant:
        yield Finding(
            "warning",
            f"loss {c.loss} with weighting {c.weighting}",
            {
                "gspo": "It gives one value per completion: so weighted, long completions count more than short ones.",
                "cispo": "Its objective is a mean over all tokens: now they count by the completion's length.",
            }[c.loss],
            f"weighting {meant}, as its paper has it.",
        )
    if c.advantage == "dr_grpo" and c.weighting == "sequence_mean":
        yield Finding(
            "note",
            "advantage dr_grpo with weighting sequence_mean",
            "Half of Dr. GRPO: a long wrong answer is still punished less per token.",
            "weighting constant_length.",
        )
    if c.loss == "cispo" and c.clip_low < 1 and memory.updates_per_step(c) > 1:
        yield Finding("note", "cispo with a lower bound", "Its paper sets none: low ratios keep weight.", "clip_low 1.")


def learning_rate(c: Config, facts: Facts) -> Iterator[Finding]:
    """Rates that do not suit float32 masters and the size of the model.

    AdamW moves every weight by about the rate in each update, whatever the gradient's size. A bfloat16 weight of 0.02
    has neighbours 6e-5 to 1e-4 away: moves far below that are rounded away, so recipes for bfloat16 masters raise the
    rate to 1e-5 and more for anything to happen. The masters here are float32 and take every move: 1e-6 acts in full.
    """
    updates, large = c.num_steps * memory.updates_per_step(c), facts.sizes.parameters >= 1e8
    if c.learning_rate == 0:
        yield Finding("sure", "learning_rate is 0", "Nothing is learned.", "1e-6 for a model of 100 million and more.")
    elif large and c.learning_rate >= 1e-5:
        yield Finding(
            "sure" if c.learning_rate >= 1e-4 else "warning",
            f"learning_rate {c.learning_rate:g} for {facts.sizes.parameters / 1e6:,.0f} million parameters",
            "A rate made for bfloat16 masters, which round most of an update away, or for adapters. Masters here are "
            "float32 and take all of it: the policy is likely to collapse.",
            "learning_rate 1e-6, up to 3e-6.",
        )
    elif updates * c.learning_rate < 1e-5:
        yield Finding(
            "note",
            f"{updates} updates of {c.learning_rate:g} move a weight by about {updates * c.learning_rate:.0e}",
            "Weights are of the order 1e-2: enough to show that all works, too little for accuracy to move.",
            "More num_steps, or a higher learning_rate.",
        )


def warmup(c: Config, facts: Facts) -> Iterator[Finding]:
    """A warm-up that outlasts the run."""
    if c.warmup_steps >= c.num_steps:
        yield Finding(
            "warning",
            f"warmup_steps ({c.warmup_steps}) is not below num_steps ({c.num_steps})",
            f"The rate reaches its peak {'in the last step only' if c.warmup_steps == c.num_steps else 'at no step'}.",
            "warmup_steps of a tenth of num_steps at most.",
        )


def kl(c: Config, facts: Facts) -> Iterator[Finding]:
    """A penalty that costs a reference and does nothing, or less than it seems."""
    if c.kl_coef == 0:
        return
    if c.kl == "k1":
        yield Finding(
            "warning",
            f"kl k1 with kl_coef {c.kl_coef:g}",
            "As a loss its gradient has expectation 0: it adds noise and penalises nothing.",
            "kl k3 or k2, or kl_coef 0.",
        )
    elif c.num_steps * memory.updates_per_step(c) == 1:
        yield Finding(
            "warning",
            f"kl_coef {c.kl_coef:g} in a run of one update",
            "Policy and reference are the same in the first update: the penalty and its gradient are exactly 0.",
            "kl_coef 0, or more steps.",
        )
    else:
        yield Finding(
            "note",
            f"kl_coef {c.kl_coef:g} does nothing in the first update",
            "Policy and reference are then the same: penalty and gradient are exactly 0. Later it costs a reference in "
            "memory and one more forward pass per step.",
            "Nothing; policy/kl must be 0 in step 1.",
        )


def step_sizes(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompts, updates and processes that do not go together."""
    rows = c.prompts_per_step * c.group_size
    if c.prompts_per_step > facts.num_train:
        yield Finding(
            "warning",
            f"prompts_per_step ({c.prompts_per_step}) is more than the {facts.num_train} training problems",
            "A step asks some problems twice, as groups of their own.",
            f"prompts_per_step {facts.num_train} and a larger group_size, or more data.",
        )
    elif c.num_steps * c.prompts_per_step > 20 * facts.num_train:
        passes = c.num_steps * c.prompts_per_step / facts.num_train
        yield Finding(
            "note",
            f"every training problem is asked {passes:.0f} times",
            "Reward on them will tell less and less about others.",
            "eval_every, and more data.",
        )
    if c.minibatch_size >= rows:
        what = f"minibatch_size ({c.minibatch_size}) is the whole step ({rows} sequences)"
        yield Finding("note", what, "One update per step, as with 0.", "minibatch_size below that, or 0.")
    elif c.minibatch_size and rows % c.minibatch_size:
        yield Finding(
            "note",
            f"minibatch_size ({c.minibatch_size}) does not divide the {rows} sequences of a step",
            f"The last update of an epoch has {rows % c.minibatch_size} sequences and the same learning rate.",
            "A minibatch_size that divides prompts_per_step * group_size.",
        )
    if c.prompts_per_step % facts.world_size:
        idle = max(0, facts.world_size - c.prompts_per_step)
        yield Finding(
            "warning" if idle else "note",
            f"{c.prompts_per_step} prompts on {facts.world_size} processes",
            f"{idle} of them have nothing to do." if idle else "Some have a prompt more, and the others wait for them.",
            "prompts_per_step a multiple of the number of processes.",
        )


def reward_weights(c: Config, facts: Facts) -> Iterator[Finding]:
    """Rewards without effect, or with the opposite one."""
    if not any(c.reward_weights):
        yield Finding("sure", "every reward_weight is 0", "All groups are flat: nothing to learn.", "Weights above 0.")
        return
    for name, weight in zip(c.rewards, c.reward_weights, strict=True):
        if weight == 0:
            yield Finding("note", f"{name} has weight 0", "It is computed and logged, not optimised.", "Nothing.")
        elif weight < 0:
            what = f"{name} has weight {weight:g}"
            yield Finding("warning", what, "What it pays for is unlearned.", "Right for a penalty; else above 0.")


def temperature(c: Config, facts: Facts) -> Iterator[Finding]:
    """Sampling far from the model's own distribution."""
    if not 0.5 <= c.temperature <= 1.3:
        means = "Completions of a group are nearly alike, most groups flat." if c.temperature < 1 else "Much is noise."
        yield Finding("warning", f"temperature {c.temperature:g}", means, "temperature 1, or a little below.")


ALGORITHM_CHECKS = (
    *(group, clipping, loss_and_weighting, learning_rate, warmup, kl, step_sizes, reward_weights, temperature),
)
