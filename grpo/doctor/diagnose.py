"""Say what is wrong with a recipe before it costs hours: findings, each with what it means and what to do.

A finding has one of three levels:

- `sure`: the run cannot do what it is for;
- `warning`: probably not intended;
- `note`: good to know.

`python train.py --check` prints all findings with tokens, memory and time, and starts nothing. A run prints the first
two levels when it begins. Left out: the checks (`check_data.py`, `check_algorithm.py`) and trouble that shows only
during a run (`watch.py`).
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from grpo.config import Config, refuse_auto
from grpo.dataloader import ProblemSets
from grpo.doctor import memory, speed
from grpo.doctor.check_algorithm import ALGORITHM_CHECKS
from grpo.doctor.check_data import DATA_CHECKS
from grpo.doctor.check_tokens import TOKEN_CHECKS
from grpo.doctor.facts import Facts, Finding, gather, outline, wrong_algorithm

AT_START = 500
"""The number of training problems whose answers a run grades when it begins. --check grades all."""

CHECKS = DATA_CHECKS + TOKEN_CHECKS + ALGORITHM_CHECKS


def diagnose(config: Config, facts: Facts) -> list[Finding]:
    """Every finding, the worst first. Every `auto` of the config must be resolved (`run.machine.settle`)."""
    order = ("sure", "warning", "note")
    found = [finding for look in CHECKS for finding in look(config, facts)]
    return sorted(found, key=lambda finding: order.index(finding.level))


def budget(config: Config, sets: ProblemSets, device: torch.device, free: int) -> int:
    """What `max_tokens_per_microbatch: auto` means on a GPU. No weight is loaded.

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
    held, sampling, learning = (size * facts.sharing for size in memory.least(c, facts))
    if held + max(sampling, learning) <= facts.free_bytes:
        return
    lower = ("prompts_per_step", "group_size", "max_new_tokens", "num_shots")
    options = ", ".join(f"{name} ({getattr(c, name)})" for name in lower)
    smaller = "take a smaller model, or kl_coef 0" if held + learning > facts.free_bytes else f"lower {options}"
    raise ValueError(
        f"a step does not fit into memory: it needs {held / 1e9:.2f} GB for weights, optimiser and copies, plus "
        f"{sampling / 1e9:.2f} GB for keys and values while sampling or {learning / 1e9:.2f} GB for gradients while "
        f"learning, but {facts.free_bytes / 1e9:.2f} GB are free on {facts.device}; {smaller}"
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
    rates = speed.measured(device, config.precision)
    lines = [*summary(config, facts, *rates), ""]
    for finding in found:
        lines += [f"{finding.level:<8} {finding.what}", f"{'':8} {finding.means}", f"{'':8} -> {finding.do}"]
    sure = sum(finding.level == "sure" for finding in found)
    lines.append(f"{len(found)} findings, {sure} surely wrong. Nothing was started.")
    return "\n".join(lines), int(sure > 0)


def summary(c: Config, facts: Facts, flops: float, bandwidth: float) -> list[str]:
    """The numbers of a recipe as lines of text: prompts, steps, tokens, memory and time."""
    step, parts = memory.tokens(c, facts), memory.by_holder(c, facts)
    time, worked = speed.seconds(c, facts, flops, bandwidth), facts.solution_tokens
    total, updates = sum(time.values()), c.num_steps * memory.updates_per_step(c)
    too_long = facts.left_out + sum(length > c.max_prompt_tokens for length in facts.prompt_tokens)
    too_short = sum(length >= c.max_new_tokens for length in worked)
    assumed = "the mean of the data's worked answers" if worked else "half of max_new_tokens: the data has no solutions"
    rows = [
        ("model", f"{facts.sizes.parameters / 1e6:,.1f} million parameters, vocabulary {facts.sizes.vocabulary:,}"),
        ("runs on", f"{facts.device}, {c.precision}, processes: {facts.world_size}"),
        ("prompts", f"{spread_of(facts.prompt_tokens)} tokens, {facts.shared_tokens} common to all; limit "
                    f"{c.max_prompt_tokens}: {too_long} over it"),
        ("solutions", f"{spread_of(worked)} tokens; limit max_new_tokens {c.max_new_tokens}: {too_short} of "
                      f"{len(worked)} do not fit" if worked else "the data has none"),
        *(("evaluated", f"{e.split}, {e.shots} shots: {e.n:,} problems, prompts up to {e.longest_prompt} tokens")
          for e in facts.evaluations),
        ("epoch", f"{facts.num_train / c.prompts_per_step:.1f} steps for the {facts.num_train:,} training problems; "
                  f"{c.prompts_per_step / facts.world_size:g} prompts per process and step"),
        ("planned", f"{c.num_steps} steps, {updates} updates, "
                    f"{c.num_steps * c.prompts_per_step / facts.num_train:.2f} epochs"),
        ("tokens", f"per step {step.prompts:,.0f} of prompts, {step.sampled:,.0f} sampled (at most "
                   f"{step.sequences * c.max_new_tokens:,}), {step.learned:,.0f} in one forward pass of learning"),
        ("", f"assumed: {step.typical:.0f} tokens per completion, {assumed}"),
        ("memory", f"about {memory.peak(parts) / 1e9:.2f} GB per process at the peak; the device has "
                   f"{facts.device_bytes / 1e9:.1f} GB"),
        *(("", f"{size / 1e9:.2f} GB  {part}") for part, size in parts.items() if size),
        ("time", f"about {total:.1f} s per step ({time['rollout']:.1f} rollout, {time['learn']:.1f} learning), "
                 f"{c.num_steps * total / 3600:.2f} h for all steps, without evaluations"),
        ("", f"assumed: {speed.EFFICIENCY:.0%} of {flops / 1e12:.2f} T operations/s, weights read at "
             f"{bandwidth / 1e9:.0f} GB/s (both measured now)"),
        ("", f"and {speed.TOKEN_S * 1e3:g} + {speed.LAYER_S * 1e3:g} * layers ms per decoding step, "
             f"{speed.PART_S * 1e3:g} ms per completion and layer of a learning pass"),
        ("", "true within a factor of two or three"),
    ]  # fmt: skip
    return [f"{name:<10} {text}" for name, text in rows]


def spread_of(lengths: tuple[int, ...]) -> str:
    """Smallest, median and largest of sorted lengths, in words."""
    return f"{lengths[0]} .. {lengths[len(lengths) // 2]} .. {lengths[-1]} (min, median, max)"
