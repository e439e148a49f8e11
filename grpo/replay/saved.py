"""What a step has sampled, in `replay/step_000011.safetensors`: enough to learn from it again.

Saved are tokens, the sampler's log-probabilities, reward terms, and which groups were learned from. Left out is what
can be computed again: rewards, advantages and masks follow from these, and log-probabilities of the old policy and of
the reference from the checkpoint before the step.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from grpo import distributed
from grpo.batch import Batch
from grpo.config import Config
from grpo.files import write_whole
from grpo.rollout import Rollout
from grpo.run.state import due

OF_ROWS = ("completion_ids", "completion_mask", "sampling_logprobs")
"""The tensors [B,T] that are saved."""


@dataclass
class Saved:
    """The n groups that were drawn in a step, in the order of their numbers, and what they have earned."""

    batch: Batch
    """Without advantages; the mask has all sampled tokens."""
    finished: Tensor
    """[n*G] bool: False if cut at `max_new_tokens`."""
    reward_terms: Tensor
    """[K,n,G] unweighted; NaN where a reward function failed."""
    learned: list[int]
    """Positions of the groups that were learned from."""


def place_of(run: Path, step: int) -> Path:
    """The file of a step."""
    return run / "replay" / f"step_{step:06d}.safetensors"


def save_step(run: Path, config: Config, step: int, rollout: Rollout, learned: Rollout) -> None:
    """Write what was sampled on all ranks, if `save_replay` is on and the weights before this step are in a checkpoint.

    A collective call; rank 0 writes. The file appears whole or not at all.

    Args:
        run: its directory.
        config: of the run.
        step: counted from 1.
        rollout: all that was drawn.
        learned: the part of it that is learned from.
    """
    if not config.save_replay or not (step == 1 or due(step - 1, config.checkpoint_every)):
        return
    completions, batch = rollout.completions, rollout.batch
    sampled = completions.batch(batch.prompt_ids, prompt_index=batch.prompt_index).to("cpu")
    here = sampled, completions.finished.cpu(), rollout.reward_terms, learned.batch.prompt_index
    gathered = distributed.gather_objects(here)

    def write() -> None:
        batches, finished, terms, chosen = zip(*gathered, strict=True)
        batch, kept = Batch.join(batches), set(chain(*chosen))
        order = sorted(range(len(batch.prompt_ids)), key=batch.prompt_index.__getitem__)
        batch = batch.select(order)
        content = {
            "prompt_ids": torch.tensor(list(chain(*batch.prompt_ids))),
            "prompt_lengths": torch.tensor([len(ids) for ids in batch.prompt_ids]),
            "prompt_index": torch.tensor(batch.prompt_index),
            **{name: getattr(batch, name) for name in OF_ROWS},
            "finished": torch.cat(finished).view(len(order), -1)[order].flatten(),
            "reward_terms": torch.cat(terms, dim=1)[:, order],
            "learned": torch.tensor([number in kept for number in batch.prompt_index]),
        }
        place_of(run, step).parent.mkdir(exist_ok=True)
        write_whole(place_of(run, step), safetensors.torch.save(content))

    distributed.on_main(write)


def read_step(run: Path, step: int) -> Saved:
    """What `save_step` wrote.

    Raises:
        ValueError: the file is damaged, or of another version.
        OSError: it can not be read.
    """
    file = place_of(run, step)
    try:
        content = safetensors.torch.load(file.read_bytes())
        prompts = content["prompt_ids"].split(content["prompt_lengths"].tolist())
        of_rows = {name: content[name] for name in OF_ROWS}
        batch = Batch(prompt_ids=prompts, prompt_index=content["prompt_index"].tolist(), **of_rows)
        learned = content["learned"].nonzero().flatten().tolist()
        return Saved(batch, content["finished"], content["reward_terms"], learned)
    except (SafetensorError, LookupError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} holds no saved step of this version ({' '.join(str(error).split())})") from None
