"""The token budget of micro-batches: when memory runs out it is halved, and the pass is made again.

A pass walks once over some rows of every rank, micro-batch by micro-batch. No rank may wait for another inside a pass,
because that one may have run out of memory. So the ranks agree after each attempt whether it succeeded everywhere.
Ranks that share a sharded policy do wait for each other, in every layer. There a lack of memory ends the run, and
`Learner.rehearse` shows it before the first update. Left out: what a pass computes (`update.py`), and the first budget,
which machine and doctor choose.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from grpo import distributed
from grpo.batch import Batch
from grpo.kernels import heap
from grpo.microbatch import Microbatch, cut_rows, empty
from grpo.policy import Policy, is_sharded

SUFFICED, TOO_MANY, ONE_ROW = 0, 1, 2
"""How an attempt ended: well; without memory, so cut smaller; without memory for a single row, which can not be cut."""


@dataclass
class Budget:
    """How much one forward and backward pass of a policy may hold."""

    policy: Policy
    """The model that computes."""
    max_tokens: int
    """The most tokens of a micro-batch. Halved whenever memory runs out, for the rest of the run."""


class Pass:
    """Some rows of this rank's batch, cut into micro-batches by the present budget. It can be made several times."""

    def __init__(self, budget: Budget, batch: Batch, rows: Sequence[int] | None = None):
        """Cut the rows; None: all. Those without a token to learn from are left out. A collective call."""
        self.budget, self.batch = budget, batch
        self.rows = range(len(batch.completion_ids)) if rows is None else rows
        self._cut()

    def _cut(self) -> None:
        """Every rank gets as many micro-batches as the rank with the most; those that it lacks are empty."""
        made = cut_rows(self.batch, self.rows, self.budget.max_tokens)
        missing = int(distributed.all_max(torch.tensor(len(made)))) - len(made)
        device = self.budget.policy.device
        self.microbatches = [Microbatch(x.rows, x.tree.to(device)) for x in made + [empty()] * missing]

    def attempts(self) -> Iterator["Attempt"]:
        """One attempt, or more of them where memory runs out on any rank: then all cut smaller and start again.

            for attempt in whole.attempts():
                result = ...                    # a new one in each attempt
                with attempt:
                    for micro in attempt:
                        ...                     # no collective call in here

        What a failed attempt has left in the policy's gradients is removed.

        Raises:
            ValueError: memory runs out with a micro-batch of a single row, or with a sharded policy.
        """
        while True:
            attempt = Attempt(self.microbatches, recovers=not is_sharded(self.budget.policy))
            yield attempt
            end = int(distributed.all_max(torch.tensor(attempt.end)))
            if end == SUFFICED:
                return
            self.budget.policy.zero_grad(set_to_none=True)
            if end == ONE_ROW:
                raise ValueError(
                    f"max_tokens_per_microbatch is {self.budget.max_tokens}: out of memory in learning from one "
                    "sequence, so a lower value cannot help; use activation_checkpointing, or lower max_new_tokens or "
                    "num_shots"
                )
            gc.collect()  # the error's traceback holds tensors in a reference cycle
            torch.cuda.empty_cache()
            self.budget.max_tokens //= 2
            self._cut()


class Attempt:
    """An iterator over micro-batches. Within `with attempt`, running out of memory ends the block without an error.

    Unless it `recovers`, it ends with one: other ranks may wait in the middle of a layer.
    """

    def __init__(self, microbatches: list[Microbatch], recovers: bool = True):
        """Start with the first micro-batch."""
        self.microbatches, self.end, self.recovers = microbatches, SUFFICED, recovers
        self.present: Microbatch | None = None

    def __iter__(self) -> Iterator[Microbatch]:
        for micro in self.microbatches:
            heap.give_back()  # a long run would grow to twice what it holds
            self.present = micro
            yield micro

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        if not self.recovers:
            raise ValueError(
                f"shard: out of memory in learning from {len(self.present.tree.input_ids)} tokens, and sharded "
                "processes can not repeat a pass; lower max_tokens_per_microbatch, or use activation_checkpointing"
            ) from error
        self.end = TOO_MANY if len(self.present.rows) > 1 else ONE_ROW
        return True
