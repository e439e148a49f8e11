"""Say what is wrong with a recipe before it costs hours: findings, each with what it means and what to do.

`python train.py --check` prints all findings with token counts and memory, and starts nothing. A run prints what is
`sure` or a `warning` when it begins. Left out: the checks (`check_*.py`) and trouble that shows only during a run
(`watch.py`).
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from grpo.config import Config, refuse_auto
from grpo.dataloader import ProblemSets
from grpo.doctor import memory
from grpo.doctor.check_algorithm import ALGORITHM_CHECKS
from grpo.doctor.check_data import DATA_CHECKS
from grpo.doctor.facts import Facts, gather, outline, wrong_algorithm
from grpo.doctor.finding import Finding

AT_START = 500
"""The number of training problems whose answers a run grades when it begins. --check grades all."""

CHECKS = DATA_CHECKS + ALGORITHM_CHECKS


def diagnose(config: Config, facts: Facts) -> list[Finding]:
    """Every finding, the worst first. Every `auto` of the config must be resolved (`run.machine.settle`)."""
    order = ("sure", "warning", "note")
    found = list(facts.found)
    for check in CHECKS:
        found += check(config, facts)
    return sorted(found, key=lambda finding: order.index(finding.level))


def budget(config: Config, sets: ProblemSets, device: torch.device, free: int) -> int:
    """The most tokens of a micro-batch that fit into memory. No weight is loaded.

    Args:
        config: of the run, with every other `auto` settled.
        sets: its problems, prompts and shapes.
        device: where it will run.
        free: free bytes, the smallest number of all ranks, so that all ranks choose the same value.
    """
    return memory.budget(config, replace(outline(config, sets, device), free_bytes=free))


def refuse_unfit(config: Config, sets: ProblemSets, device: torch.device, free: int) -> None:
    """Check that the algorithm is known and that a step fits into memory, before any weight is loaded.

    The arguments are those of `budget`.

    Raises:
        ValueError: a name of the algorithm is wrong, or a step surely needs more memory; the message says what to do.
    """
    refuse_auto(config)
    if wrong := wrong_algorithm(config):
        raise ValueError(wrong[0])
    refuse_too_large(config, replace(outline(config, sets, device), free_bytes=free))


def refuse_too_large(c: Config, facts: Facts) -> None:
    """Raise ValueError if the exactly known parts of a step need more than the free memory.

    Estimates alone never refuse a run.
    """
    least = memory.least(c, facts)
    if least.peak <= facts.free_bytes:
        return
    lower = ("prompts_per_step", "group_size", "max_new_tokens", "num_shots")
    remedy = "lower " + ", ".join(f"{name} ({getattr(c, name)})" for name in lower)
    if least.held + least.learning > facts.free_bytes:
        remedy = "take a smaller model, or kl_coef 0"
        remedy += ", or shard full" if facts.world_size > 1 and c.shard == "none" else ""
    raise ValueError(
        f"a step does not fit into memory: it needs {least.held / 1e9:.2f} GB for weights, optimiser and copies, plus "
        f"{least.sampling / 1e9:.2f} GB for keys and values while sampling or {least.learning / 1e9:.2f} GB for "
        f"gradients while learning, but {facts.free_bytes / 1e9:.2f} GB are free on {facts.device}; {remedy}"
    )


def warn(
    config: Config, sets: ProblemSets, device: torch.device, should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Print the findings of level `sure` and `warning` on stderr, one per line, when a run is about to start."""
    for finding in diagnose(config, gather(config, sets, device, AT_START, should_stop)):
        if finding.level != "note":
            print(f"{finding.level}: {finding.what}. {finding.means} -> {finding.do}", file=sys.stderr, flush=True)


def check(config: Config, sets: ProblemSets, device: torch.device) -> tuple[str, int]:
    """Check everything and start nothing. Every `auto` of the config must be settled.

    Returns:
        The report, and the exit code: 1 if there is a finding of level `sure`, else 0.

    Raises:
        ValueError: the model or the training data cannot be read.
    """
    facts = gather(config, sets, device)
    found = diagnose(config, facts)
    lines = [*summary(config, facts), ""]
    for finding in found:
        lines += [f"{finding.level:<8} {finding.what}", f"{'':8} {finding.means}", f"{'':8} -> {finding.do}"]
    sure = sum(finding.level == "sure" for finding in found)
    lines.append(f"{len(found)} finding{'s' * (len(found) != 1)}, {sure} surely wrong. Nothing was started.")
    return "\n".join(lines), int(sure > 0)


def summary(c: Config, facts: Facts) -> list[str]:
    """The numbers of a recipe as lines of text: prompts, steps and memory."""
    needed, worked, parts = memory.estimate(c, facts), facts.solution_tokens, memory.gathered(c, facts)
    divided = f", each with 1/{memory.shards(c, facts)} of the weights" if parts else ""
    too_long = facts.left_out + sum(length > c.max_prompt_tokens for length in facts.prompt_tokens)
    too_short = sum(length >= c.max_new_tokens for length in worked)
    drawn = c.num_steps * c.prompts_per_step
    solutions = "the data has no worked ones"
    if worked:
        limit = f"limit max_new_tokens {c.max_new_tokens}: {too_short} of {len(worked)} do not fit"
        solutions = f"{spread_of(worked)} tokens; {limit}"
    rows = [
        ("model", f"{facts.sizes.parameters / 1e6:,.1f} million parameters, vocabulary {facts.sizes.vocabulary:,}"),
        ("runs on", f"{facts.device}, {c.precision}, processes: {facts.world_size}{divided}"),
        ("prompts", f"{spread_of(facts.prompt_tokens)} tokens, {facts.shared_tokens} common to all; limit "
                    f"{c.max_prompt_tokens}: {too_long} over it"),
        ("solutions", solutions),
        *(("evaluated", f"{e.split}, {e.shots} shots: {e.n:,} problems, prompts up to {e.longest_prompt} tokens")
          for e in facts.evaluations),
        ("planned", f"{c.num_steps} steps, {c.num_steps * memory.updates_per_step(c)} updates, "
                    f"{drawn / facts.num_train:.2f} epochs of the {facts.num_train:,} training problems"),
        ("sampled", f"at most {c.prompts_per_step * c.group_size * c.max_new_tokens:,} tokens per step"),
        ("memory", f"about {needed.peak / 1e9:.2f} GB at the peak; the device has {facts.device_bytes / 1e9:.1f} GB"),
        *(("", f"{size / 1e9:.2f} GB  {name}") for name, size in memory.copies(c, facts).items() if size),
        ("", f"{needed.sampling / 1e9:.2f} GB  sampling: keys, values, logits, packed weights"),
        *(("", f"{size / 1e9:.2f} GB  {name}, while learning") for name, size in parts.items()),
        ("", f"{(needed.learning - facts.sharing * sum(parts.values())) / 1e9:.2f} GB  learning: activations, logits"),
    ]  # fmt: skip
    return [f"{name:<10} {text}" for name, text in rows]


def spread_of(lengths: tuple[int, ...]) -> str:
    """Smallest, median and largest of sorted lengths, in words."""
    return f"{lengths[0]} .. {lengths[len(lengths) // 2]} .. {lengths[-1]} (min, median, max)"
