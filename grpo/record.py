"""What a step's rollout leaves behind: its numbers among the metrics, and every completion in a file.

Left out: what learning measures (`update.py`), and how metrics are written (`run/log.py`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo import distributed
from grpo.files import write_lines
from grpo.metrics import Sums
from grpo.rollout import Rollout
from rewards import label


def measure(
    rollout: Rollout, reward_names: Sequence[str], sums: Sums, reported: Mapping[str, tuple[float, int]] | None = None
) -> None:
    """Add a rollout to the step's metrics: rewards of valid samples, flat groups, lengths, truncation.

    Args:
        rollout: all that was drawn in the step.
        reward_names: K names.
        sums: the step's metrics.
        reported: {name: sum and count} of what reward functions reported themselves (`RewardRunner.reported`).
    """
    valid, mask = rollout.valid, rollout.completions.completion_mask
    sums.add_where("reward/mean", rollout.rewards, valid)
    for name, term in zip(reward_names, rollout.reward_terms, strict=True):
        sums.add_where(f"reward/{label(name)}", term, term.isfinite())
    sums.add("reward/invalid", (~valid).sum(), valid.numel())
    sums.add("reward/flat_groups", rollout.flat().sum(), len(valid))
    sums.add("completion/length", mask.sum(), len(mask))
    sums.add("tokens/sampled", mask.sum())
    sums.add("completion/truncated", (~rollout.completions.finished).sum(), len(mask))
    for name, (total, count) in (reported or {}).items():
        sums.add(f"reward_metrics/{name}", total, count)


def write_transcripts(path: Path, rollout: Rollout, reward_names: Sequence[str], tokenizer) -> None:
    """Write every completion of the step on all ranks: one JSON line for each prompt, with its group in `completions`.

    Lines are ordered by prompt, and completions by sample. `prompt` is what the model was given, special tokens
    included. A reward that failed or does not apply is null. The file appears whole.
    """
    G, completions = rollout.rewards.shape[1], rollout.completions
    finished = completions.finished.tolist()
    lengths = completions.completion_mask.sum(1).tolist()
    ids, logprobs = completions.completion_ids.tolist(), completions.sampling_logprobs.tolist()
    used = sorted({token for row, length in zip(ids, lengths, strict=True) for token in row[:length]})
    words = {token: tokenizer.decode([token]) for token in used}
    groups = []
    for i, problem in enumerate(rollout.problems):
        group = {
            "prompt_index": rollout.batch.prompt_index[i],
            "question": problem.info.get("question", problem.prompt),
            "prompt": tokenizer.decode(rollout.batch.prompt_ids[i], clean_up_tokenization_spaces=False),
            "answer": problem.answer,
            "completions": [],
        }
        for j in range(G):
            row = i * G + j
            terms = [value if math.isfinite(value) else None for value in rollout.reward_terms[:, i, j].tolist()]
            group["completions"].append(
                {
                    "sample": j,
                    "completion": completions.texts[row],
                    "rewards": dict(zip(map(label, reward_names), terms, strict=True)),
                    "reward": rollout.rewards[i, j].item() if rollout.valid[i, j] else None,
                    "advantage": rollout.advantages[i, j].item(),
                    "finished": finished[row],
                    "tokens": [words[token] for token in ids[row][: lengths[row]]],
                    "logprobs": [round(value, 4) for value in logprobs[row][: lengths[row]]],
                }
            )
        groups.append(group)
    gathered = distributed.gather_objects(groups)

    def write() -> None:
        lines = sorted((group for rank in gathered for group in rank), key=lambda group: group["prompt_index"])
        path.parent.mkdir(exist_ok=True)
        write_lines(path, lines)

    distributed.on_main(write)
