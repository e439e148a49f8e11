"""The optimiser of a policy (AdamW, SGD or Muon, all of torch), and what a step sets: learning rate and coefficients.

Left out: when a step is made (`update.py`).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from grpo import distributed
from grpo.config import Config
from grpo.metrics import Sums
from grpo.objective import next_entropy_coef, next_kl_coef
from grpo.policy import Policy


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


def coefficients(config: Config, moved: Mapping[str, float] | None) -> dict[str, float]:
    """The coefficients of KL and entropy in a step: `moved` by `next_coefs`, or as the options say."""
    return {"kl_coef": config.kl_coef, "entropy_coef": config.entropy_coef} | (moved or {})


def next_coefs(config: Config, moved: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """The coefficients of the next step that follow a target; {} if none does.

    Args:
        config: the run's.
        moved: those of the step. `entropy_level` is what `entropy_coef` is while it is applied.
        metrics: of the step, the same on all ranks. What was not measured, since nothing was learned, moves nothing.
    """
    after, sequences = dict(moved), config.prompts_per_step * config.group_size
    now = {"entropy_level": config.entropy_coef} | coefficients(config, moved)
    kl, entropy = (metrics.get(f"policy/{name}", math.nan) for name in ("kl", "entropy"))
    if config.kl_target and not math.isnan(kl):
        known = {"kl_target": config.kl_target, "kl_horizon": config.kl_horizon}
        after["kl_coef"] = next_kl_coef(now["kl_coef"], kl, sequences=sequences, **known)
    if config.entropy_target and not math.isnan(entropy):
        known = {"entropy_target": config.entropy_target, "entropy_step": config.entropy_step}
        after["entropy_level"] = next_entropy_coef(now["entropy_level"], entropy, **known)
        after["entropy_coef"] = after["entropy_level"] if entropy <= config.entropy_target else 0.0
    return after


def make_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """The optimiser that the config names, over float32 master weights. What is frozen is left out.

    Weight decay applies to matrices, not to vectors (norms, biases). The moments are allocated here instead of in the
    first update, for three reasons: they do not fragment the memory, the first step needs as much memory as the others,
    and a lack of memory shows before anything is sampled.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if config.optimizer != "muon":
        return {"adamw": _adamw, "sgd": _sgd}[config.optimizer](parameters, config)
    ends = {policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight}
    inner = [p for p in parameters if p.ndim == 2 and p not in ends]
    others = [p for p in parameters if p.ndim != 2 or p in ends]
    return Both(_muon(inner, config), _adamw(others, config))


class Both(torch.optim.Optimizer):
    """Two optimisers of different parameters as one: one state, one list of groups, one step."""

    def __init__(self, *parts: torch.optim.Optimizer):
        """Take over the state and the groups of the parts."""
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self._hand_out()

    def _hand_out(self) -> None:
        """Give each part the state, and its groups. They are the same objects, so a new rate reaches the parts."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self) -> None:
        """Step all parts."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict) -> None:
        """As any optimiser's."""
        super().load_state_dict(state_dict)
        self._hand_out()


def _groups(parameters: Sequence[nn.Parameter], config: Config) -> list[dict]:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _adamw(parameters: Sequence[nn.Parameter], config: Config) -> torch.optim.AdamW:
    groups, betas = _groups(parameters, config), (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    for p in [p for group in groups for p in group["params"]]:  # in the order in which torch would make them
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}
    return optimizer


def _sgd(parameters: Sequence[nn.Parameter], config: Config) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(_groups(parameters, config), lr=config.learning_rate, momentum=config.sgd_momentum)
    if config.sgd_momentum:
        _allocate_momentum(optimizer, parameters)
    return optimizer


def _muon(parameters: Sequence[nn.Parameter], config: Config) -> torch.optim.Muon:
    """Its updates have the size of AdamW's (`match_rms_adamw`), so that both can share one learning rate."""
    optimizer = torch.optim.Muon(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    _allocate_momentum(optimizer, parameters)
    return optimizer


def _allocate_momentum(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}


def clip_and_step(
    policy: Policy, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_grad_norm: float, sums: Sums
) -> bool:
    """Clip the gradient, step the optimiser and forget the gradient.

    Args:
        policy: with the summed gradients of an update.
        optimizer, scaler: of the policy. The scaler is on in fp16 only.
        max_grad_norm: a larger gradient is scaled down to this norm; 0: off.
        sums: metrics of the step, to be added to.

    Returns:
        False if the step was skipped because the gradient was not finite. It does not count as skipped if the scaler
        lowered its scale instead.
    """
    scaler.unscale_(optimizer)
    norm = distributed.whole(nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm or torch.inf))
    finite = bool(norm.isfinite())
    if finite:
        sums.add("optim/grad_norm", norm, 1)
        sums.add("optim/updates", int(distributed.is_main()))
    backed_off = not finite and scaler.is_enabled() and scaler.get_scale() > 1
    if finite or scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    left_out = not finite and not backed_off
    sums.add("optim/skipped", int(left_out and distributed.is_main()))
    return not left_out
