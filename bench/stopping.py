"""Measure what a rollout costs when rows end early: seconds, and tokens that were really sampled.

    python -m bench.stopping --model DIR --out stopping.json

Every rollout has the same prompts. One in 512, 128 or 32 tokens of the vocabulary counts as EOS, or none, so rows end
at random places. A sampler that drops finished rows pays for `tokens_sampled`. A sampler that pads to the longest row
pays for `padded`, the number of rows times the longest row. `in_flight` rows are decoded together, and the others wait
for a free place (continuous refilling). Left out: learning.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.ours import LONGEST_PROMPT, problems_of, problems_of_step
from bench.process import machine, versions
from bench.work import Sampled, at_least, check_out
from grpo import distributed, options
from grpo.dataloader import encode_prompts
from grpo.files import write_whole
from grpo.policy import load_policy
from grpo.run.machine import settings
from grpo.sampler import Sampler

COLUMNS = ("one_in", "in_flight", "tokens_sampled", "padded", "rollout_s", "ms_per_token")


@dataclass(frozen=True)
class Stopping(Sampled):
    """Measure rollouts whose rows end at random places, with all rows in flight and with refilling."""

    one_in: tuple[int, ...] = (0, 512, 128, 32)
    """One in this many tokens of the vocabulary ends a row; 0: none."""
    in_flight: tuple[int, ...] = (0, 16)
    """Number of rows decoded together; 0: all."""
    out: str = "stopping.json"
    """File of the results."""

    def __post_init__(self) -> None:
        """Raises ValueError for a size or file that is not allowed."""
        super().__post_init__()
        at_least(self, {"one_in": 0, "in_flight": 0})


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 0, or 2 for a wrong option."""
    asked = options.parse(Stopping, argv, "bench.stopping")
    try:
        check_out(asked.out)
        device = distributed.init(asked.device)
        with settings(device, asked.dtype):
            rows = measure(asked, device)
        written = {"machine": machine(asked.device), "versions": versions(), "settings": vars(asked), "rollouts": rows}
        write_whole(Path(asked.out), json.dumps(written, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"bench.stopping: error: {error}", file=sys.stderr)
        return 2
    table = Table(*(name.replace("_", " ") for name in COLUMNS))
    for row in rows:
        table.add_row(*(f"{row[name]:,.4g}" if isinstance(row[name], float) else f"{row[name]:,}" for name in COLUMNS))
    Console().print(table)
    return 0


def measure(asked: Stopping, device: torch.device) -> list[dict]:
    """One row of numbers for each pair of `one_in` and `in_flight`, after an untimed rollout."""
    if asked.threads:
        torch.set_num_threads(asked.threads)
    policy, tokenizer = load_policy(asked.model, device=device, precision=asked.dtype)
    problems = problems_of_step(asked, problems_of(asked), 1)
    encoded = encode_prompts(problems, tokenizer, chat=False, max_prompt_tokens=LONGEST_PROMPT)
    sampler = Sampler(policy, tokenizer)

    def rollout(one_in: int, in_flight: int) -> dict:
        ends = torch.arange(policy.vocab_size) * 2654435761 % 2**32  # scattered over the vocabulary
        sampler.is_eos[:] = (ends % one_in == 0) if one_in else False
        start = time.perf_counter()
        lengths = sampler.generate(
            [row.tolist() for row in encoded],
            group_size=asked.group,
            max_new_tokens=asked.new_tokens,
            temperature=1.0,
            seed=asked.seed,
            step=1,
            max_rows=in_flight or None,
        ).completion_mask.sum(1)
        seconds, tokens = time.perf_counter() - start, int(lengths.sum())
        return {
            "one_in": one_in,
            "in_flight": in_flight or len(lengths),
            "tokens_sampled": tokens,
            "padded": len(lengths) * int(lengths.max()),
            "rollout_s": seconds,
            "ms_per_token": 1e3 * seconds / tokens,
        }

    rollout(asked.one_in[0], 0)
    return [rollout(one_in, in_flight) for in_flight in asked.in_flight for one_in in asked.one_in]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
