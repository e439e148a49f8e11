"""Check the options of the algorithm: find those that have no effect, the opposite effect, or not their paper's effect.

Each check is a function `(config, facts) -> Iterator[Finding]`. `ALGORITHM_CHECKS` lists them, and `diagnose.py` runs
them. Left out: whether a value is the best one, and impossible values (`config.py` refuses them).
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
            "A completion is compared with the others of its group. Alone, its advantage is 0 and nothing is learned.",
            "group_size 8 or more.",
        )
    elif c.group_size < 4:
        flat = "; with advantage grpo a group of two always gets +0.7 and -0.7, or is flat" if c.group_size == 2 else ""
        yield Finding(
            "note",
            f"group_size is {c.group_size}",
            f"The baseline is a mean over few, and for a hard or easy problem most groups are flat{flat}.",
            "group_size 8, and fewer prompts_per_step for the same cost.",
        )


def clipping(c: Config, facts: Facts) -> Iterator[Finding]:
    """Clip bounds that never act or act on every token, and updates without a ratio."""
    several = memory.updates_per_step(c) > 1
    if c.loss == "reinforce" and several:
        yield Finding(
            "warning",
            f"loss reinforce makes {memory.updates_per_step(c)} updates of each step's completions",
            "It has no ratio that corrects for old samples. From the second update on, its gradient is biased.",
            "One update per step (num_epochs 1, minibatch_size 0), or loss grpo.",
        )
    if c.loss not in CLIPPING:
        return
    if not several:
        yield Finding(
            "note",
            "one update per step: the ratio is exactly 1, and clip_low and clip_high never act",
            f"loss {c.loss} is then the plain on-policy policy gradient, whatever the bounds. This is right.",
            "Nothing. If clipping should act: num_epochs 2 or a minibatch_size.",
        )
    elif c.loss in ("gspo", "gspo_token") and min(c.clip_low, c.clip_high) > 0.01:
        yield Finding(
            "warning",
            f"loss {c.loss} with bounds of {c.clip_low:g} and {c.clip_high:g} never clips",
            "Its ratio is a mean over a whole completion, which hardly changes.",
            "clip_low 3e-4 and clip_high 4e-4, as in its paper.",
        )
    elif 0 in (c.clip_low, c.clip_high) and c.loss != "cispo":
        yield Finding(
            "warning",
            f"clip_low is {c.clip_low:g} and clip_high {c.clip_high:g}",
            "A bound of 0 clips at the ratio 1. From the second update on, every token on that side has no gradient.",
            "clip_low 0.2, clip_high 0.2 to 0.28.",
        )


def loss_and_weighting(c: Config, facts: Facts) -> Iterator[Finding]:
    """Losses and advantages whose paper uses another denominator."""
    by_row = dict.fromkeys(("gspo", "gspo_token", "gmpo"), "sequence_mean")
    meant = (by_row | {"cispo": "token_mean"}).get(c.loss)
    if meant and c.weighting != meant:
        yield Finding(
            "warning",
            f"loss {c.loss} with weighting {c.weighting}",
            "It gives one value per completion: so weighted, long ones count more than short ones."
            if c.loss in by_row
            else "Its objective is a mean over all tokens. Here a token counts by its completion's length.",
            f"weighting {meant}, as in its paper.",
        )
    if c.advantage == "dr_grpo" and c.weighting == "sequence_mean":
        yield Finding(
            "note",
            "advantage dr_grpo with weighting sequence_mean",
            "This is half of Dr. GRPO. A long wrong answer is still punished less per token.",
            "weighting constant_length.",
        )
    if c.loss == "cispo" and c.clip_low < 1 and memory.updates_per_step(c) > 1:
        means = "Its paper has no lower bound. With one, tokens of low ratio keep too much weight."
        yield Finding("note", "cispo with a lower bound", means, "clip_low 1.")


def learning_rate(c: Config, facts: Facts) -> Iterator[Finding]:
    """Learning rates that do not suit float32 master weights and the size of the model.

    In each update AdamW changes every weight by about the learning rate, whatever the size of the gradient. The
    neighbours of a bfloat16 weight of 0.02 are 6e-5 to 1e-4 away, and much smaller changes are rounded away. Recipes
    for bfloat16 master weights therefore use 1e-5 and more. Master weights here are float32, so even 1e-6 takes effect.
    """
    updates, large = c.num_steps * memory.updates_per_step(c), facts.sizes.parameters >= 1e8
    if c.learning_rate == 0:
        yield Finding("sure", "learning_rate is 0", "Nothing is learned.", "1e-6 for a model of 100 million and more.")
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


def warmup(c: Config, facts: Facts) -> Iterator[Finding]:
    """A warm-up that is longer than the run."""
    if c.warmup_steps >= c.num_steps:
        yield Finding(
            "warning",
            f"warmup_steps ({c.warmup_steps}) is not below num_steps ({c.num_steps})",
            f"The rate reaches its peak {'in the last step only' if c.warmup_steps == c.num_steps else 'at no step'}.",
            "warmup_steps of a tenth of num_steps at most.",
        )


def kl(c: Config, facts: Facts) -> Iterator[Finding]:
    """A KL penalty that needs a reference model but has no effect, or less effect than it seems."""
    if c.kl_coef == 0:
        return
    if c.kl == "k1" and c.kl_in == "loss":
        yield Finding(
            "warning",
            f"kl k1 with kl_coef {c.kl_coef:g}",
            "As a loss, its expected gradient is 0. It adds noise and penalises nothing.",
            "kl k3 or k2, kl_in reward, or kl_coef 0.",
        )
    elif c.num_steps * memory.updates_per_step(c) == 1:
        yield Finding(
            "warning",
            f"kl_coef {c.kl_coef:g} in a run of one update",
            "Policy and reference are equal in the first update, so the penalty and its gradient are exactly 0.",
            "kl_coef 0, or more steps.",
        )
    else:
        yield Finding(
            "note",
            f"kl_coef {c.kl_coef:g} does nothing in the first update",
            "Policy and reference are equal then, so penalty and gradient are exactly 0. It costs memory for a "
            "reference, and one more forward pass per step.",
            "Nothing. policy/kl must be 0 in step 1.",
        )


def step_sizes(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompts, updates and processes that do not go together."""
    rows = c.prompts_per_step * c.group_size
    if c.prompts_per_step > facts.num_train:
        yield Finding(
            "warning",
            f"prompts_per_step ({c.prompts_per_step}) is more than the {facts.num_train} training problems",
            "A step draws some problems twice, each time as a group of its own.",
            f"prompts_per_step {facts.num_train} and a larger group_size, or more data.",
        )
    elif c.num_steps * c.prompts_per_step > 20 * facts.num_train:
        passes = c.num_steps * c.prompts_per_step / facts.num_train
        yield Finding(
            "note",
            f"every training problem is drawn {passes:.0f} times",
            "The training reward will say less and less about other problems.",
            "Set eval_every, and use more data.",
        )
    if c.minibatch_size >= rows:
        what = f"minibatch_size ({c.minibatch_size}) is the whole step ({rows} sequences)"
        yield Finding("note", what, "There is one update per step, as with 0.", "A smaller minibatch_size, or 0.")
    elif c.minibatch_size and rows % c.minibatch_size:
        yield Finding(
            "note",
            f"minibatch_size ({c.minibatch_size}) does not divide the {rows} sequences of a step",
            f"The last update of an epoch has {rows % c.minibatch_size} sequences, but the same learning rate.",
            "A minibatch_size that divides prompts_per_step * group_size.",
        )
    if c.prompts_per_step % facts.world_size:
        idle = max(0, facts.world_size - c.prompts_per_step)
        wait = "Some have one prompt more, and the others wait for them."
        yield Finding(
            "warning" if idle else "note",
            f"{c.prompts_per_step} prompts on {facts.world_size} processes",
            f"{idle} of them have nothing to do." if idle else wait,
            "prompts_per_step a multiple of the number of processes.",
        )


def reward_weights(c: Config, facts: Facts) -> Iterator[Finding]:
    """Rewards without effect, or with the opposite effect."""
    if not any(c.reward_weights):
        means = "All groups are flat, so nothing is learned."
        yield Finding("sure", "every reward_weight is 0", means, "Weights above 0.")
        return
    for name, weight in zip(c.rewards, c.reward_weights, strict=True):
        if weight == 0:
            yield Finding("note", f"{name} has weight 0", "It is computed and logged, but not optimised.", "Nothing.")
        elif weight < 0:
            what = f"{name} has weight {weight:g}"
            means = "The model learns to avoid what this function rewards."
            yield Finding("warning", what, means, "Right for a penalty; otherwise a weight above 0.")


def temperature(c: Config, facts: Facts) -> Iterator[Finding]:
    """Sampling far from the model's own distribution."""
    if not 0.5 <= c.temperature <= 1.3:
        alike = "Completions of a group are nearly equal, so most groups are flat."
        means = alike if c.temperature < 1 else "Much of the text is noise."
        yield Finding("warning", f"temperature {c.temperature:g}", means, "temperature 1, or a little lower.")


ALGORITHM_CHECKS = (
    *(group, clipping, loss_and_weighting, learning_rate, warmup, kl, step_sizes, reward_weights, temperature),
)
