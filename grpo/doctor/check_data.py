"""Check what a recipe uses: prompts, solutions, splits and memory.

Each check is a pure function `(config, facts) -> Iterator[Finding]`. `DATA_CHECKS` lists them, and `diagnose.py` runs
them. Left out: the options of the algorithm (`check_algorithm.py`).
"""

from collections.abc import Iterator
from dataclasses import replace

from grpo.config import Config
from grpo.doctor import memory
from grpo.doctor.facts import Facts
from grpo.doctor.finding import Finding


def long_prompts(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompts that are over their limit, in training or in evaluations."""
    over = sum(length > c.max_prompt_tokens for length in facts.prompt_tokens)
    means = "Prompts are never cut. The run stops before its first step."
    if over:
        longest = facts.prompt_tokens[-1]
        what = f"{over} of {len(facts.prompt_tokens)} training prompts exceed max_prompt_tokens ({c.max_prompt_tokens})"
        do = f"max_prompt_tokens {longest}, fewer shots, or skip_long_prompts True to leave them out of training."
        yield Finding("sure", what, means, do)
    for e in facts.evaluations:
        if e.longest_prompt > e.prompt_limit:
            what = f"{e.split} prompts with {e.shots} shots have up to {e.longest_prompt} tokens, over {e.prompt_limit}"
            yield Finding("sure", what, means, f"max_prompt_tokens {e.longest_prompt}, or fewer shots in eval_shots.")


def context(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompts and completions that are longer than the model's context."""
    longest = max([facts.prompt_tokens[-1], *(e.longest_prompt for e in facts.evaluations)]) + c.max_new_tokens
    if facts.sizes.context and longest > facts.sizes.context:
        level, means = "warning", "Beyond its positions a model writes noise, which would be learned from."
        if facts.sizes.ends:
            level = "sure"
            means = "Its positions, a table or a sliding window, end there: the run stops before its first step."
        yield Finding(
            level,
            f"prompt and completion reach {longest} tokens, the model was made for {facts.sizes.context}",
            means,
            "Lower max_new_tokens or the number of shots.",
        )


def short_completions(c: Config, facts: Facts) -> Iterator[Finding]:
    """A max_new_tokens that is too small for the data's own solutions."""
    lengths = facts.solution_tokens
    cut = sum(length >= c.max_new_tokens for length in lengths) / max(1, len(lengths))
    if cut >= 0.05:
        masked = ". With mask_truncated they are left out of the loss" if c.mask_truncated else ""
        yield Finding(
            "sure" if cut >= 0.9 else "warning",
            f"{cut:.0%} of the data's own solutions do not fit into max_new_tokens ({c.max_new_tokens})",
            f"Completions of that length are cut and graded without their answer{masked}.",
            f"max_new_tokens {lengths[int(0.98 * (len(lengths) - 1))] + 16} would hold 98 % of them.",
        )


def trained_on_test(c: Config, facts: Facts) -> Iterator[Finding]:
    """Evaluation questions that are training questions too."""
    for e in facts.evaluations:
        if e.also_trained:
            yield Finding(
                "sure" if len(e.also_trained) >= 0.01 * e.n else "warning",
                f"{len(e.also_trained)} of {e.n} {e.split} questions are training questions, such as "
                f"{e.also_trained[0][:60]!r}",
                "Accuracy on them shows memory, not skill.",
                "Remove them from the training file.",
            )


def evaluated_shots(c: Config, facts: Facts) -> Iterator[Finding]:
    """A final evaluation with other prompts than those of training."""
    if c.final_eval and c.eval_shots and c.num_shots not in c.eval_shots:
        yield Finding(
            "warning",
            f"trained with {c.num_shots} shots and evaluated with {', '.join(map(str, c.eval_shots))}",
            "The number of shots used in training is never measured.",
            f"eval_shots with {c.num_shots} in it.",
        )


def fits(c: Config, facts: Facts) -> Iterator[Finding]:
    """Whether the memory that is needed fits on the device."""
    expected = memory.estimate(c, facts)
    if expected.peak <= facts.device_bytes:
        return
    divided = memory.estimate(replace(c, shard="full"), facts).peak
    advice = "kl_coef 0 (no reference), activation_checkpointing, a smaller max_tokens_per_microbatch, a smaller model."
    if divided < expected.peak:
        advice = f"shard full, with which about {divided / 1e9:.1f} GB are needed; {advice}"
    yield Finding(
        "sure" if memory.least(c, facts).peak > facts.device_bytes else "warning",
        f"about {expected.peak / 1e9:.1f} GB are needed, {expected.held / 1e9:.1f} GB of them for weights and "
        f"optimiser; the device has {facts.device_bytes / 1e9:.1f} GB",
        "The run would go out of memory in its first steps.",
        advice,
    )


DATA_CHECKS = (
    long_prompts,
    context,
    short_completions,
    trained_on_test,
    evaluated_shots,
    fits,
)
