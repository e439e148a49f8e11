"""AdamW for a policy, and the learning rate of each step. Left out: the step itself, with clipping (`update.py`)."""

import math

import torch
from torch import nn

from grpo.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of a step (counted from 1).

    It warms up linearly. Then it is constant, or falls (linear, cosine) so that it would reach 0 just after the last
    step.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return config.learning_rate * factor


def make_optimizer(policy: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over float32 master weights. Weight decay applies to matrices, not to vectors (norms, biases).

    The moments are allocated here instead of in the first update, for three reasons: they do not fragment the memory,
    the first step needs as much memory as the others, and a lack of memory shows before anything is sampled.
    """
    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    for p in matrices + vectors:
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}
    return optimizer
