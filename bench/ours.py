"""Time our own step, with the project used as in `train.py`. This file also defines the work for all contestants.

All have the same prompts, rewards, KL (k3, frozen reference), optimiser and learning rate. Unless `one_in` says so,
nothing ends a completion early, so all sample the same number of tokens. Left out: whether the result is right, which
the tests check.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import data
from bench.work import Work
from data.problem import Problem
from grpo import distributed
from grpo.config import Config, from_yaml
from grpo.dataloader import ProblemSets
from grpo.doctor import diagnose
from grpo.kernels.compiled import compile_layers
from grpo.metrics import Sums
from grpo.policy import frozen_copy, load_policy
from grpo.prompts.order import draw_prompts
from grpo.rollout import Collector
from grpo.run.log import Clock
from grpo.run.machine import device_memory, peak_bytes, settings, settle
from grpo.sampler import Sampler
from grpo.tree import shared_prefix
from grpo.update import Learner
from rewards.runner import RewardRunner

REWARDS = ("gsm8k.format", "gsm8k.correctness")
KL_COEF = 0.04
LEARNING_RATE = 1e-6
LONGEST_PROMPT = 1 << 20


def problems_of(work: Work) -> list[Problem]:
    """The training problems, without stop strings."""
    if work.train is None:
        problems = data.load("arithmetic", "train", num_shots=work.shots, seed=work.seed)
    else:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "train.jsonl").symlink_to(Path(work.train).resolve())
            problems = data.load("gsm8k", "train", path=place, num_shots=work.shots, seed=work.seed)
    return [replace(problem, info=problem.info | {"stop": []}) for problem in problems]


def problems_of_step(work: Work, problems: list[Problem], step: int) -> list[Problem]:
    """The problems of step `step` (from 1), as our own loop draws them."""
    return [problems[i] for i in draw_prompts(len(problems), work.prompts, work.seed, step)]


def config_of(work: Work) -> Config:
    """Our config for this work."""
    return replace(
        from_yaml(work.recipe) if work.recipe else Config(),
        seed=work.seed,
        device=work.device,
        precision=work.dtype,
        model=work.model,
        num_shots=work.shots,
        max_prompt_tokens=LONGEST_PROMPT,
        prompts_per_step=work.prompts,
        group_size=work.group,
        max_new_tokens=work.new_tokens,
        temperature=1.0,
        rewards=REWARDS,
        reward_weights=(1.0, 1.0),
        kl="k3",
        kl_coef=KL_COEF,
        learning_rate=LEARNING_RATE,
    )


def ours(work: dict) -> dict:
    """Run and time steps of the project's own loop.

    Args:
        work: the fields of `Work`.

    Returns:
        The entries of `result`, and:

        - `tokens_computed`: distinct tokens of a step;
        - `padded`: what a sampler would compute that pads every row of a step to the longest one;
        - `sampler_gap_max`: in nats, the largest of a step;
        - `state_bytes`: see the function of this name;
        - `max_tokens_per_microbatch`, `activation_checkpointing`, `compile`: how the work was divided.
    """
    asked = Work(**work)
    device = distributed.init(asked.device)
    with settings(device):
        return timed(asked, device)


def timed(asked: Work, device: torch.device) -> dict:
    """What `ours` returns, in a process whose settings are made."""
    problems, free = problems_of(asked), device_memory(device)[0]
    sets = ProblemSets(config_of(asked), {("train", asked.shots): problems})
    config = settle(config_of(asked), device, budget=lambda known: diagnose.budget(known, sets, device, free))
    diagnose.refuse_unfit(config, sets, device, free)
    policy, tokenizer = load_policy(
        config.model,
        device=device,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
    )
    reference = frozen_copy(policy)
    if config.compile:
        compile_layers(policy, reference)
    learner = Learner(config, policy, reference)
    sampler = Sampler(policy, tokenizer, kernels=config.compile)
    sampler.is_eos[:] = ending(policy.vocab_size, asked.one_in)
    steps = []
    with RewardRunner(config.rewards, config.reward_timeout) as runner:
        collector = Collector(config, problems, sampler, runner, sets.prompt_ids("train", asked.shots))
        for step in range(1, asked.warmup + asked.steps + 1):
            sums, clock = Sums(), Clock()
            with clock("rollout"):
                sampler.refresh(policy)
                drawn = collector.sample(step)
            with clock("reward"):
                rollout = collector.reward(drawn)
            with clock("learn"):
                learner.learn(rollout.batch, step, sums)
            times = {f"{name.removeprefix('time/')}_s": seconds for name, seconds in clock.seconds().items()}
            lengths = drawn.completions.completion_mask.sum(1)
            metrics = sums.reduce()
            counts = {
                "tokens_sampled": int(lengths.sum()),
                "padded": len(lengths) * int(lengths.max()),
                "tokens_computed": int(metrics["tokens/computed"]),
                "sampler_gap_max": metrics["policy/sampler_gap_max"],
            }
            steps.append(times | counts)
    return result(asked, steps, drawn.batch.prompt_ids, device) | {
        "state_bytes": state_bytes(learner, sampler),
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
        "activation_checkpointing": config.activation_checkpointing,
        "compile": config.compile,
    }


def ending(vocabulary: int, one_in: int) -> torch.Tensor:
    """[vocabulary] bool: True for one in `one_in` tokens, scattered over the vocabulary, or for none if it is 0."""
    if one_in == 0:
        return torch.zeros(vocabulary, dtype=torch.bool)
    return torch.arange(vocabulary) * 2654435761 % 2**32 % one_in == 0


def state_bytes(learner: Learner, sampler: Sampler) -> int:
    """Bytes that do not depend on the size of a step: weights, gradients, optimiser, reference, the sampler's copy."""
    modules = (learner.policy, learner.reference, sampler.policy)
    weights = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    held = [*weights.values(), *learner.policy.parameters(), *moments]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def result(work: Work, steps: list[dict], prompt_ids: list[list[int]], device: torch.device) -> dict:
    """The result of a contestant: means over the timed steps, peak memory, and sizes of the work.

    Args:
        work: what was measured.
        steps: numbers of each step, warm-up included; `rollout_s`, `reward_s`, `learn_s`, `step_s` are seconds. A
            contestant that does not learn has the first alone.
        prompt_ids: prompts of the last step.
        device: where it ran.

    Raises:
        RuntimeError: the contestant sampled another number of tokens than it should.
    """
    timed = steps[work.warmup :]
    wanted = work.prompts * work.group * work.new_tokens
    for step in timed:
        if step["tokens_sampled"] != wanted and not work.one_in:
            raise RuntimeError(f"sampled {step['tokens_sampled']} tokens in a step that should sample {wanted}")
    means = {name: sum(step[name] for step in timed) / len(timed) for name in timed[0]}
    return {
        **setting(prompt_ids, device),
        **means,
        "peak_bytes": int(peak_bytes(device)["memory/peak_bytes"]),
        "sampled_per_s": means["tokens_sampled"] / means["rollout_s"],
        "warmup_steps": steps[: work.warmup],
        "steps": timed,
    }


def setting(prompt_ids: list[list[int]], device: torch.device) -> dict:
    """Facts that are the same for all contestants, among them those about the prompts of the last step."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "trunk_tokens": shared_prefix(prompt_ids),
        "prompt_tokens": sum(map(len, {tuple(row) for row in prompt_ids})),
        "threads": torch.get_num_threads(),
    }


def now(device: torch.device) -> float:
    """The time in seconds, after all work on the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
