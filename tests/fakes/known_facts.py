"""Facts of a recipe with nothing wrong, for the tests of the checks: each changes one thing."""

from dataclasses import replace

import torch

from grpo.config import Config
from grpo.doctor.facts import Evaluation, Facts, Sizes

SIZES = Sizes(
    parameters=500_000_000,
    rounded=350_000_000,
    layers=24,
    width=896,
    intermediate=4864,
    key_width=128,
    vocabulary=150_000,
    context=32_768,
    adapted=450_000,
    dtype=torch.bfloat16,
)
EVALUATION = Evaluation("test", 8, 1319, 1000, 4096, also_trained=())
FACTS = Facts(
    sizes=SIZES,
    num_train=7000,
    prompt_tokens=tuple(range(800, 900)),
    shared_tokens=750,
    solution_tokens=tuple(range(50, 150)),
    evaluations=(EVALUATION,),
    device="cuda",
    device_bytes=80 * 10**9,
)
CONFIG = Config(
    model="Qwen/Qwen2.5-0.5B",
    data="gsm8k",
    num_shots=8,
    num_steps=200,
    prompts_per_step=32,
    max_new_tokens=256,
    num_epochs=2,
    kl_coef=0.0,
    learning_rate=1e-6,
    device="cuda",
    precision="bf16",
    max_tokens_per_microbatch=16384,
)


def facts(**changes) -> Facts:
    return replace(FACTS, **changes)


def config(**changes) -> Config:
    return replace(CONFIG, **changes)
