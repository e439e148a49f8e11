"""Time our own step, with the project used as in `train.py`. This file also defines the work for all contestants.

Nothing ends a completion early, so every contestant samples the same number of tokens. All have the same prompts,
rewards, KL (k3, frozen reference), optimiser and learning rate. Left out: whether the result is right, which the tests
check.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import data
from bench.speed import measured
from bench.work import Sampled, Work
from data.problem import Problem
from grpo import distributed
from grpo.config import Config, from_yaml
from grpo.dataloader import draw_prompts
from grpo.doctor import diagnose
from grpo.kernels.compiled import compile_layers
from grpo.metrics import Sums
from grpo.policy import Policy, Reference, load_policy, load_shapes
from grpo.rollout import Collector
from grpo.run.log import Clock
from grpo.run.machine import device_memory, peak_bytes, prepare, resolve
from grpo.sampler import Sampler
from grpo.tree import shared_prefix
from grpo.update import Learner
from rewards.runner import RewardRunner

REWARDS = ("gsm8k.format", "gsm8k.correctness")
KL_COEF = 0.04
LEARNING_RATE = 1e-6
LONGEST_PROMPT = 1 << 20


def problems_of(work: Sampled) -> list[Problem]:
    """The training problems, without stop strings."""
    if work.train is None:
        problems = data.load("arithmetic", "train", num_shots=work.shots, seed=work.seed)
    else:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "train.jsonl").symlink_to(Path(work.train).resolve())
            problems = data.load("gsm8k", "train", path=place, num_shots=work.shots, seed=work.seed)
    return [replace(problem, info=problem.info | {"stop": []}) for problem in problems]


def problems_of_step(work: Sampled, problems: list[Problem], step: int) -> list[Problem]:
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


def check(work: dict) -> dict:
    """Read everything that contestants will read, except weights. Returns {}; raises ValueError if something fails."""
    asked = Work(**work)
    distributed.init(asked.device)
    config_of(asked)
    problems_of(asked)
    load_shapes(asked.model)
    return {}


def ours(work: dict) -> dict:
    """Run and time steps of the project's own loop.

    Args:
        work: the fields of `Work`.

    Returns:
        The entries of `result`, and:

        - `tokens_computed`: tokens of a step; `tokens_remembered`: those that the reference need not compute;
        - `parameters_used`, `state_bytes`: see the functions of these names;
        - `matrix_flops`: measured operations per second of the device; `learn_mfu`: the share that learning reaches;
        - `sampler_gap_max`: in nats;
        - `max_tokens_per_microbatch`, `activation_checkpointing`, `compile`: how the work was divided.
    """
    asked = Work(**work)
    device = distributed.init(asked.device)
    config = resolve(config_of(asked), device)
    prepare(device, config.precision)
    problems = problems_of(asked)
    config = diagnose.fit(config, problems, device, device_memory(device)[0])
    policy, tokenizer = load_policy(
        config.model,
        device=device,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
    )
    reference = Reference(policy)
    if config.compile:
        compile_layers(policy, reference.policy)
    learner = Learner(config, policy, reference)
    sampler = Sampler(policy, tokenizer, kernels=config.compile)
    sampler.is_eos[:] = False
    steps = []
    with RewardRunner(config.rewards, config.reward_timeout) as runner:
        collector = Collector(config, problems, sampler, runner)
        reference.remember(collector.trunk_ids)
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
            metrics = sums.reduce()
            times["tokens_sampled"] = int(drawn.completions.completion_mask.sum())
            times["tokens_computed"] = int(metrics["tokens/computed"])
            steps.append(times | {"sampler_gap_max": metrics["policy/sampler_gap_max"]})
    means = result(asked, steps, drawn.prompt_ids, device)
    computed = sum(step["tokens_computed"] for step in means["steps"]) / asked.steps
    used = parameters_used(policy)
    flops, _ = measured(device, config.precision)
    remembered = len(reference.trunk_ids)
    useful = used * (6 * computed + 2 * (computed - remembered))  # policy forward and backward, reference forward
    return means | {
        "tokens_computed": computed,
        "tokens_remembered": remembered,
        "parameters_used": used,
        "state_bytes": state_bytes(learner, sampler),
        "matrix_flops": flops,
        "learn_mfu": useful / means["learn_s"] / flops,
        "sampler_gap_max": max(step["sampler_gap_max"] for step in means["steps"]),
        "max_tokens_per_microbatch": config.max_tokens_per_microbatch,
        "activation_checkpointing": config.activation_checkpointing,
        "compile": config.compile,
    }


def state_bytes(learner: Learner, sampler: Sampler) -> int:
    """Bytes that do not depend on the size of a step: weights, gradients, optimiser, reference, the sampler's copy."""
    modules = (learner.policy, learner.reference, sampler.policy)
    weights = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    held = [*weights.values(), *learner.policy.parameters(), *moments]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def parameters_used(policy: Policy) -> int:
    """Number of weights that a token is multiplied with: all but the embedding table. The head counts, even if tied."""
    model = policy.model
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.numel() for p in model.parameters()) - (0 if head is table else table.numel())


def result(work: Work, steps: list[dict], prompt_ids: list[list[int]], device: torch.device) -> dict:
    """The result of a contestant: means over the timed steps, peak memory, and sizes of the work.

    Args:
        work: what was measured.
        steps: numbers of each step, warm-up included; `rollout_s`, `reward_s`, `learn_s`, `step_s` are seconds.
        prompt_ids: prompts of the last step.
        device: where it ran.

    Raises:
        RuntimeError: the contestant sampled another number of tokens than it should.
    """
    warmed, timed = steps[: work.warmup], steps[work.warmup :]
    sampled = work.prompts * work.group * work.new_tokens
    for step in timed:
        if step["tokens_sampled"] != sampled:
            raise RuntimeError(f"sampled {step['tokens_sampled']} tokens in a step that should sample {sampled}")
    means = {
        name: sum(step[name] for step in timed) / len(timed) if name in timed[0] else None
        for name in ("rollout_s", "reward_s", "learn_s", "step_s")
    }
    return means | {
        "peak_bytes": int(peak_bytes(device)["memory/peak_bytes"]),
        "tokens_sampled": sampled,
        "sampled_per_s": sampled / means["rollout_s"],
        "trunk_tokens": shared_prefix(prompt_ids),
        "prompt_tokens": sum(map(len, {tuple(row) for row in prompt_ids})),
        "threads": torch.get_num_threads(),
        "warmup_steps": warmed,
        "steps": timed,
    }


def now(device: torch.device) -> float:
    """The time in seconds, after all work on the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
