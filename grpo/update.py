"""Learning from a step's rollouts: epochs, minibatches, micro-batches, one optimiser step per minibatch.

A step is rollout plus learning; an update is one optimiser step. The loss of a micro-batch is
`(token_weights * per_token_loss).sum()`. Its weights are made from counts of the whole update on all ranks, so the
gradient is the same however rows are cut into micro-batches or spread over ranks.

The way to the formula: `Learner.learn`, `accumulate`, `_loss`, `objective` of `objective.py`, then one of `losses.py`.
Left out: the weight of a token (`weighting.py`), what happens when memory runs out (`budget.py`), and how a policy is
sharded (`policy/sharding.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo import distributed
from grpo.batch import Batch
from grpo.budget import Budget, Pass
from grpo.config import Config
from grpo.corrections import CORRECTIONS
from grpo.kernels.compiled import compile_layers
from grpo.kl import KL, k3
from grpo.losses import LOSSES
from grpo.metrics import Sums
from grpo.microbatch import Microbatch, counts_of, cut_groups, distinct_tokens, empty, largest
from grpo.objective import highest_entropy, objective
from grpo.optimizer import clip_and_step, coefficients, learning_rate, make_optimizer
from grpo.policy import Policy, add_adapters, is_sharded, mix_in, reference_of, scatter, shard, trained
from grpo.tables import asked, constants, lookup
from grpo.weighting import WEIGHTINGS


def make_ready(policy: Policy, config: Config, with_reference: bool) -> nn.Module | None:
    """Give a policy, as it was loaded, what learning needs beside its weights: adapters and compiled layers.

    Args:
        policy: changed in place.
        config: the run's.
        with_reference: whether there is a KL.

    Returns:
        the reference, or None.
    """
    add_adapters(policy, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    reference = reference_of(policy) if with_reference else None
    if config.compile:
        compile_layers(policy, reference)
    if reference is not None:
        shard(reference, config.shard)
    return reference


class Learner:
    """Makes the updates of a step. Built once per run; calls the policy only through `module`, as DDP requires.

    A sharded policy is called as it is.
    """

    def __init__(self, config: Config, policy: Policy, reference: nn.Module | None):
        """Look up the functions that the config names. With several ranks shard the policy, or wrap it in DDP.

        Copies of the policy, such as a sampler's, have to be made before.

        Args:
            config: the run's config, with `max_tokens_per_microbatch` resolved to a number.
            policy: the model that learns.
            reference: the frozen reference (`policy/reference.py`), called like a policy; None without KL.

        Raises:
            ValueError: `loss`, `weighting`, `kl` or `sampler_correction` is unknown, a constant of one has no
                option, or an `auto` is not resolved.
        """
        if config.max_tokens_per_microbatch == "auto":
            raise ValueError("max_tokens_per_microbatch is 'auto': a Learner needs a number; `settle` gives one")
        self.config, self.policy, self.reference = config, policy, reference
        self.loss = lookup(LOSSES, config.loss, "loss")
        self.constants = constants(self.loss, config)
        self.correction = lookup(CORRECTIONS, config.sampler_correction, "sampler_correction")
        self.bounds = constants(self.correction, config, "sampler_correction")
        self.kl = lookup(KL, config.kl, "kl")
        self.weighting = lookup(WEIGHTINGS, config.weighting, "weighting")
        self.budget = Budget(policy, config.max_tokens_per_microbatch)
        shard(policy, config.shard)
        self.module = policy if is_sharded(policy) else distributed.data_parallel(policy)
        for _ in range(0 if is_sharded(policy) else 2):
            self._sum_gradients_over_ranks()  # in the forward after its first backward DDP rearranges its buckets
        policy.zero_grad(set_to_none=True)
        self.optimizer = make_optimizer(policy, config)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.autocast_dtype == torch.float16)

    @property
    def max_tokens(self) -> int:
        """The present token budget of a micro-batch."""
        return self.budget.max_tokens

    def learn(
        self,
        batch: Batch,
        step: int,
        sums: Sums,
        coefs: Mapping[str, float] | None = None,
        look: Callable[[int, Sums], None] | None = None,
    ) -> bool:
        """Make all updates of a step: all epochs and minibatches.

        Args:
            batch: this rank's rows; may be empty. Groups may have been left out.
            step: counted from 1; decides the learning rate and the order of minibatches.
            sums: the step's metrics; those of learning are added to it.
            coefs: what `next_coefs` has found; None: `kl_coef` and `entropy_coef` are the options.
            look: called in every update with its number, from 0, and its metrics, when its gradient is there and before
                that is clipped.

        Returns:
            False if an update was skipped because its gradient was not finite. It does not count as skipped if fp16's
            loss scaler lowered its scale instead.

        Raises:
            ValueError: a single sequence needs more memory than there is, or the batch lacks what is learned from.
        """
        batch.refuse_unlearnable(self.config.group_size)
        config, rate = self.config, learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums.add("optim/lr", rate, 1)
        coefs = coefficients(config, coefs)
        sums.add("policy/kl_coef", coefs["kl_coef"], 1)
        sums.add("policy/entropy_coef", coefs["entropy_coef"], 1)
        sums.add("tokens/computed", distinct_tokens(batch))
        sums.add("optim/updates", 0)  # `clip_and_step` counts

        batch, whole, updates = self.prepare(batch, step)
        finite = first = True
        for number, rows in enumerate(updates):
            of_update = self.accumulate(batch, rows, whole, coefs)
            if of_update is None:
                continue
            if not first and self._is_far(of_update):
                self.policy.zero_grad(set_to_none=True)
                break
            first = False
            sums.merge(of_update)
            if look is not None:
                look(number, of_update)
            finite &= clip_and_step(self.policy, self.optimizer, self.scaler, config.max_grad_norm, sums)
        return finite

    def prepare(self, batch: Batch, step: int) -> tuple[Batch, Pass, list[list[int] | None]]:
        """Get ready for the updates of a step, which have the present policy as the old one. A collective call.

        Args:
            batch, step: as for `learn`.

        Returns:
            the batch with the log-probabilities that updates need, a pass over all of its rows, and the rows of each
            update; None: all.
        """
        config = self.config
        order = config.minibatch_size, config.group_size, (config.seed, step)
        updates = [rows for epoch in range(config.num_epochs) for rows in cut_groups(batch, *order, epoch)]
        whole = Pass(self.budget, batch)
        if len(updates) > 1 or config.entropy_share < 1:
            logprobs, entropy = self._without_gradient(self.module, whole)
            batch = replace(batch, old_logprobs=logprobs) if len(updates) > 1 else batch
        if config.entropy_share < 1:
            of = entropy, batch.completion_mask, config.entropy_share
            batch = replace(batch, surrogate_mask=highest_entropy(*of, sum_over_ranks=distributed.all_sum))
        if len(updates) == config.num_epochs:
            updates = [None] * len(updates)
        return self.with_ref_logprobs(batch, whole), whole, updates

    def accumulate(self, batch: Batch, rows: list[int] | None, whole: Pass, coefs: Mapping[str, float]) -> Sums | None:
        """Add the gradient of an update, over all ranks, to the policy's parameters. A collective call.

        Args:
            batch, whole: as `prepare` gave them.
            rows: of this update.
            coefs: `kl_coef` and `entropy_coef` of this step.

        Returns:
            the update's metrics; None: it has no token to learn from, and there is no gradient.
        """
        counts = counts_of(batch, whole.rows if rows is None else rows, self.config.group_size)
        if counts["num_tokens"] == 0:
            return None
        update = whole if rows is None else Pass(self.budget, batch, rows)
        for attempt in update.attempts():
            sums = Sums()
            with attempt, distributed.alone(self.module):
                for micro in attempt:
                    # Not given a name: a loss that outlives a failed attempt would keep its activations in memory.
                    self.scaler.scale(self._loss(batch, micro, counts, sums, coefs)).backward()
        self._sum_gradients_over_ranks()
        sums.add("optim/loss", 0, int(distributed.is_main()))  # one update more
        return sums

    def with_ref_logprobs(self, batch: Batch, whole: Pass | None = None) -> Batch:
        """The batch with the reference's log-probabilities. They may be had before there are advantages.

        A collective call. A batch that has them stays as it is, and so does every batch where there is no reference.

        Args:
            batch: this rank's rows.
            whole: a pass over all of them; None: it is made here.
        """
        if self.reference is None or batch.ref_logprobs is not None:
            return batch
        whole = whole or Pass(self.budget, batch)
        return replace(batch, ref_logprobs=self._without_gradient(self.reference, whole)[0])

    def rehearse(self, longest: int) -> None:
        """Compute the largest micro-batch, of sequences of `longest` tokens, to see whether memory suffices."""
        tree = largest(max(self.max_tokens, longest), longest).to(self.policy.device)
        logprobs, _ = self.module(tree, self.config.temperature)
        logprobs.sum().backward()
        self.policy.zero_grad(set_to_none=True)

    @property
    def trained(self) -> nn.Module:
        """What changes of the policy in the run, and so belongs into a checkpoint."""
        return trained(self.policy)

    @property
    def moving_reference(self) -> nn.Module | None:
        """The reference, if it changes in the run and so belongs into a checkpoint; else None."""
        return self.reference if self.config.reference_sync_every else None

    def renew_reference(self, step: int) -> None:
        """Move the reference towards the policy, if that is due after this step."""
        if self.moving_reference is not None and step % self.config.reference_sync_every == 0:
            mix_in(self.reference, self.policy, self.config.reference_mix)

    def _loss(
        self, batch: Batch, micro: Microbatch, counts: dict[str, Any], sums: Sums, coefs: Mapping[str, float]
    ) -> Tensor:
        """The micro-batch's share of the update's loss. Its share of the metrics is added to `sums`."""
        config, part = self.config, batch.take(micro.rows)
        mask = part.completion_mask
        logprobs, entropy = scatter(micro.tree, self.module(micro.tree, config.temperature), mask.shape)
        old_logprobs = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        anchor = part.sampling_logprobs if config.ratio_to == "sampler" else old_logprobs
        found = objective(
            logprobs,
            anchor,
            part.sampling_logprobs,
            part.ref_logprobs,
            part.advantages,
            mask,
            loss=self.loss,
            constants=self.constants,
            correction=self.correction,
            bounds=self.bounds,
            kl=self.kl,
            kl_coef=coefs["kl_coef"],
            kl_in=config.kl_in,
            surrogate_mask=part.surrogate_mask,
        )
        of_rows = {"group_tokens": counts["group_tokens"][micro.rows]}
        facts = counts | of_rows | {"max_new_tokens": config.max_new_tokens, "dtype": logprobs.dtype}
        weights = self.weighting(mask, **asked(self.weighting, facts))
        loss = (weights * found.per_token_loss).sum()
        if coefs["entropy_coef"]:
            loss = loss - coefs["entropy_coef"] * (weights * entropy.where(mask, 0)).sum()

        sums.add("optim/loss", loss, 0)  # weight 0: `learn` counts each update once
        sums.add_where("policy/entropy", entropy, mask)
        sums.add_where("policy/ratio_mean", (logprobs.detach() - anchor).exp(), mask)
        sums.add_where("policy/clip_fraction", found.clipped, mask)
        gap = (old_logprobs - part.sampling_logprobs).abs()
        sums.add_where("policy/sampler_gap_mean", gap, mask)
        if micro.rows:
            sums.maximum("policy/sampler_gap_max", gap.where(mask, 0).max())
            sums.maximum("policy/correction_max", found.factor.where(mask, 0).max())
        sums.add_effective_size("policy/correction_ess", found.factor, mask)
        sums.add_where("policy/correction_masked", found.factor == 0, mask)
        if part.old_logprobs is not None:
            sums.add_where("policy/old_kl", k3(old_logprobs, logprobs.detach()), mask)
        if part.surrogate_mask is not None:
            sums.add_where("policy/entropy_share", part.surrogate_mask, mask)
        if found.kl is not None:
            sums.add_where("policy/kl", found.kl, mask)
        return loss

    def _is_far(self, update: Sums) -> bool:
        """Whether the policy has moved further than `kl_stop` on an update's tokens, the same on all ranks."""
        return self.config.kl_stop < torch.inf and update.reduce()["policy/old_kl"] > self.config.kl_stop

    @torch.no_grad()
    def _without_gradient(self, model: nn.Module, whole: Pass) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of a pass under a model, each [B,T]; 0 where there is no token."""
        shape, device = whole.batch.completion_ids.shape, self.policy.device
        dtype = torch.promote_types(next(self.policy.parameters()).dtype, torch.float32)
        for attempt in whole.attempts():
            found = torch.zeros(2, *shape, device=device, dtype=dtype)
            with attempt:
                for micro in attempt:
                    rows = torch.tensor(micro.rows, dtype=torch.long).to(device)[micro.tree.row]
                    found[:, rows, micro.tree.column] = torch.stack(model(micro.tree, self.config.temperature))
        return found[0], found[1]

    def _sum_gradients_over_ranks(self) -> None:
        """Replace every gradient by its sum over the ranks, which have accumulated theirs alone. Nothing else does so.

        DDP averages them in the backward pass of an empty micro-batch, which itself adds 0. Shards are averaged in
        that of each micro-batch. Weights are made from counts over all ranks, so the sum is wanted: the average times
        the number of ranks.
        """
        if distributed.world_size() == 1:
            return
        if self.module is not self.policy:
            logprobs, _ = self.module(empty().tree.to(self.policy.device), self.config.temperature)
            logprobs.sum().backward()
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, distributed.world_size())
