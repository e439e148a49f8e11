"""Learning from a step's rollouts: epochs, minibatches, micro-batches, one optimiser step per minibatch.

A step is rollout plus learning; an update is one optimiser step. The loss of a micro-batch is
`(token_weights * per_token_loss).sum()`. Its weights are made from counts of the whole update on all ranks, so the
gradient is the same however rows are cut into micro-batches or spread over ranks. This file only decides which rows are
computed when. The loss of a token is in `objective.py`, and its weight in `weighting.py`.

When memory runs out, rows are cut smaller and the pass is made again. This is why no rank may wait for another inside a
pass. Each rank accumulates gradients alone, then all agree that none failed, and only then does DDP sum the gradients.
Left out: sharding.
"""

import gc
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from grpo import distributed
from grpo.batch import Batch
from grpo.config import Config, constants, lookup
from grpo.corrections import CORRECTIONS
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.metrics import Sums
from grpo.microbatch import Microbatch, cut_groups, cut_rows, distinct_tokens, empty
from grpo.objective import objective
from grpo.policy import Policy, scatter
from grpo.weighting import WEIGHTINGS, count

T = TypeVar("T")


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


class Learner:
    """Makes the updates of a step. Built once per run; calls the policy only through `module`, as DDP requires."""

    def __init__(self, config: Config, policy: Policy, reference: nn.Module | None):
        """Wrap the policy in DDP where there are several ranks, and look up the functions that the config names.

        Args:
            config: the run's config, with `max_tokens_per_microbatch` resolved to a number.
            policy: the model that learns.
            reference: the frozen reference (`policy/reference.py`), called like a policy; None without KL.

        Raises:
            ValueError: `loss`, `weighting`, `kl` or `sampler_correction` is unknown, a constant of the loss has no
                option, or an `auto` is not resolved.
        """
        if config.max_tokens_per_microbatch == "auto":
            raise ValueError(
                "max_tokens_per_microbatch is 'auto': a Learner needs a number; `grpo.run.machine.settle` gives one"
            )
        self.config, self.reference = config, reference
        loss = lookup(LOSSES, config.loss, "loss")
        correction = lookup(CORRECTIONS, config.sampler_correction, "sampler_correction")
        self.objective = partial(
            objective,
            loss=partial(loss, **constants(loss, config)),
            correction=partial(correction, cap=config.correction_cap),
            kl=lookup(KL, config.kl, "kl"),
            kl_coef=config.kl_coef,
        )
        self.weighting = lookup(WEIGHTINGS, config.weighting, "weighting")
        self.max_tokens = config.max_tokens_per_microbatch
        """Token budget of a micro-batch. Halved whenever memory runs out, for the rest of the run."""
        self.policy = policy
        self.module: nn.Module = policy
        if distributed.world_size() > 1:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is not in torch 2.9
                self.module = DistributedDataParallel(policy, broadcast_buffers=False, gradient_as_bucket_view=True)
            # DDP rearranges its buckets, with all ranks, in the forward after its first backward. Have that done now.
            for _ in range(2):
                self._sum_over_ranks()
            policy.zero_grad(set_to_none=True)
        self.optimizer = make_optimizer(policy, config)
        fp16 = policy.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=fp16)

    def learn(self, batch: Batch, step: int, sums: Sums) -> bool:
        """Make all updates of a step: all epochs and minibatches.

        Args:
            batch: this rank's rows; may be empty.
            step: counted from 1; decides the learning rate and the order of minibatches.
            sums: the step's metrics; those of learning are added to it.

        Returns:
            False if an update was skipped because its gradient was not finite. If fp16's loss scaler lowered its scale
            instead, this does not count as skipped.

        Raises:
            ValueError: a single sequence needs more memory than there is, or the batch lacks what is learned from.
        """
        config = self.config
        for name in ("advantages", "sampling_logprobs"):
            if getattr(batch, name) is None:
                raise ValueError(f"{name}: the batch has none, and a step can not be learned without them")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        sums.add("optim/lr", learning_rate(config, step), 1)
        everything = self._microbatches(batch, torch.arange(len(batch.completion_ids)))
        sums.add("tokens/computed", distinct_tokens(batch))
        order = config.minibatch_size, config.group_size, (config.seed, step)
        epochs = [cut_groups(batch, *order, epoch) for epoch in range(config.num_epochs)]
        if sum(map(len, epochs)) > 1:
            batch = replace(batch, old_logprobs=self._frozen_logprobs(self.module, batch, everything))
        ref_logprobs = None
        if self.reference is not None:
            ref_logprobs = self._frozen_logprobs(self.reference, batch, everything)
        finite = True
        for epoch, minibatches in enumerate(epochs):
            for rows in minibatches:
                parts = everything if len(minibatches) == 1 else self._microbatches(batch, rows)
                finite &= self._update(batch, rows, parts, ref_logprobs, sums, first_epoch=epoch == 0)
        return finite

    def _update(
        self,
        batch: Batch,
        rows: Tensor,
        microbatches: list[Microbatch],
        ref_logprobs: Tensor | None,
        sums: Sums,
        *,
        first_epoch: bool,
    ) -> bool:
        """One update on these rows of all ranks. Returns False if it was skipped, as `learn` does."""
        mask = batch.completion_mask[rows.to(batch.completion_mask.device)]
        num_tokens, num_sequences = distributed.all_sum(torch.tensor(count(mask))).tolist()
        if num_tokens == 0:
            return True
        weigh = partial(
            self.weighting,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            max_new_tokens=self.config.max_new_tokens,
        )

        def descend(micro: Microbatch, attempt: Sums) -> None:
            with self.module.no_sync() if self.module is not self.policy else nullcontext():
                loss = self._loss(batch, micro, ref_logprobs, weigh, attempt, first_epoch)
                # DDP averages gradients over ranks; the weights already count over all of them.
                self.scaler.scale(loss * distributed.world_size()).backward()

        sums.merge(self._within_memory(batch, rows, microbatches, Sums, descend))
        self._sum_over_ranks()
        sums.add("optim/loss", 0, int(distributed.is_main()))
        return self._step(sums)

    def _loss(
        self,
        batch: Batch,
        micro: Microbatch,
        ref_logprobs: Tensor | None,
        weigh: Callable[[Tensor], Tensor],
        sums: Sums,
        first_epoch: bool,
    ) -> Tensor:
        """The micro-batch's share of the update's loss. Its share of the metrics is added to `sums`."""
        rows = micro.rows.to(self.policy.device)
        mask, advantages = batch.completion_mask[rows], batch.advantages[rows]
        logprobs, entropy = scatter(micro.tree, self.module(micro.tree, self.config.temperature), mask.shape)
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[rows]
        sampling_logprobs = batch.sampling_logprobs[rows]
        reference = None if ref_logprobs is None else ref_logprobs[rows]

        found = self.objective(logprobs, old_logprobs, sampling_logprobs, reference, advantages, mask)
        loss = (weigh(mask) * found.per_token_loss).sum()

        def of_tokens(values: Tensor) -> Tensor:  # zeros instead of selecting: that would wait for the GPU
            return values.detach().where(mask, 0)

        tokens = mask.sum()
        sums.add("optim/loss", loss.detach(), 0)  # weight 0: `_update` counts each update once
        sums.add("policy/entropy", of_tokens(entropy).sum(), tokens)
        sums.add("policy/ratio_mean", of_tokens(torch.exp(logprobs.detach() - old_logprobs)).sum(), tokens)
        sums.add("policy/clip_fraction", of_tokens(found.clipped).sum(), tokens)
        if found.kl is not None:
            sums.add("policy/kl", of_tokens(found.kl).sum(), tokens)
        if first_epoch:
            gap = of_tokens((old_logprobs - sampling_logprobs).abs())
            sums.add("policy/sampler_gap_mean", gap.sum(), tokens)
            if gap.numel():
                sums.maximum("policy/sampler_gap_max", gap.max())
        return loss

    def _step(self, sums: Sums) -> bool:
        """Clip the gradient and step the optimiser. Returns False if skipped (gradient not finite), as `learn` does."""
        self.scaler.unscale_(self.optimizer)
        max_norm = self.config.max_grad_norm or torch.inf
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), max_norm)
        finite = bool(norm.isfinite())
        if finite:
            sums.add("optim/grad_norm", norm, 1)
        backed_off = not finite and self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        left_out = not finite and not backed_off
        sums.add("optim/skipped", int(left_out and distributed.is_main()))
        return not left_out

    def _microbatches(self, batch: Batch, rows: Tensor) -> list[Microbatch]:
        """Cut rows into micro-batches by the present budget. A collective call."""
        return cut_rows(batch, rows, self.max_tokens, self.policy.device)

    @torch.no_grad()
    def _frozen_logprobs(self, policy: nn.Module, batch: Batch, microbatches: list[Microbatch]) -> Tensor:
        """[B,T] log-probabilities of all rows under a policy, without gradient; 0 where there is no token."""
        device, shape = self.policy.device, batch.completion_ids.shape

        def fill(micro: Microbatch, logprobs: Tensor) -> None:
            tree = micro.tree
            values, _ = policy(tree, self.config.temperature)
            logprobs[micro.rows.to(device)[tree.row], tree.column] = values

        zeros = partial(torch.zeros, shape, device=device, dtype=torch.get_default_dtype())
        return self._within_memory(batch, torch.arange(len(batch.completion_ids)), microbatches, zeros, fill)

    def _within_memory(
        self,
        batch: Batch,
        rows: Tensor,
        microbatches: list[Microbatch],
        start: Callable[[], T],
        each: Callable[[Microbatch, T], None],
    ) -> T:
        """Make a pass over micro-batches. If memory runs out on any rank, all ranks halve the budget and start again.

        Args:
            batch, rows: what the micro-batches were cut from.
            microbatches: the list is refilled in place with smaller ones when the budget is halved.
            start: makes a new, empty collection for each attempt.
            each: computes one micro-batch and adds it to the collection. It must make no collective call: a rank that
                has run out of memory would not take part.

        Returns:
            The collection of the attempt that succeeded.

        Raises:
            ValueError: memory runs out with a micro-batch of a single sequence.
        """
        while True:
            collected, trouble = start(), 0
            for micro in microbatches:
                try:
                    each(micro, collected)
                except torch.OutOfMemoryError:
                    trouble = 1 if len(micro.rows) > 1 else 2  # 2: a single sequence, which cannot be cut
                    break
            trouble = int(distributed.all_max(torch.tensor(trouble)))
            if trouble == 0:
                return collected
            self.optimizer.zero_grad(set_to_none=True)
            if trouble == 2:
                raise ValueError(
                    f"max_tokens_per_microbatch is {self.max_tokens}: out of memory in learning from one sequence, "
                    "so a lower value cannot help; use activation_checkpointing, or lower max_new_tokens or num_shots"
                )
            gc.collect()  # the error's traceback holds tensors in a reference cycle
            torch.cuda.empty_cache()
            self.max_tokens //= 2
            microbatches[:] = self._microbatches(batch, rows)

    def _sum_over_ranks(self) -> None:
        """Sum the gradients over ranks, by DDP in the backward pass of an empty micro-batch, which itself adds 0."""
        if self.module is not self.policy:
            logprobs, _ = self.module(empty(self.policy.device).tree, self.config.temperature)
            logprobs.sum().backward()
