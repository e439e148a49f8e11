"""Compare our step with what a researcher would otherwise use, on the same work: seconds, memory, and ratio to ours.

    python -m bench.peers --model DIR --train FILE --shots 8 --prompts 4 --group 8 --new-tokens 64 --out peers.json

The contestants:

- `ours`;
- `trl`: TRL's GRPOTrainer (bench/requirements.txt);
- `hf_generate` and `hf_continuous`: Hugging Face's `generate` and `generate_batch`, for the rollout only.

Each runs in its own process. If one fails, the results say why, and the others still run. docs/benchmarks.md explains
the results. Left out: more than one GPU.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from bench.process import call, machine, versions
from bench.work import Work, at_least, check_out, prepared
from grpo import options
from grpo.files import write_whole

CONTESTANTS = {
    "ours": "bench.ours:ours",
    "trl": "bench.theirs:trl",
    "hf_generate": "bench.theirs:hf_generate",
    "hf_continuous": "bench.theirs:hf_continuous",
}
TRL_BATCHES = (32, 16, 8, 4)
NUMBERS = ("rollout_s", "learn_s", "step_s", "peak_bytes", "tokens_sampled")
SETTING = ("trunk_tokens", "prompt_tokens", "threads")
"""Facts about the work that contestants report; the same for all."""


@dataclass(frozen=True)
class Peers(Work):
    """Compare our step with TRL's, and our sampling with Hugging Face's."""

    only: tuple[Literal["ours", "trl", "hf_generate", "hf_continuous"], ...] = tuple(CONTESTANTS)
    """Contestants to run, in this order; one that is named twice runs twice in a round."""
    rounds: int = 1
    """Number of rounds; in each all contestants run in turn. The round with the median seconds counts."""
    limit: float = 7200.0
    """Seconds that one contestant may take in a round, over all of its tries."""
    trl_batch: int = 0
    """Sequences in TRL's forward and backward pass; 0: the largest of 32, 16, 8, 4 that stays under trl_max_gb."""
    trl_max_gb: float = 22.0
    """Largest peak memory of TRL, in 1e9 bytes, when its batch is chosen."""
    trl_checkpointing: bool = False
    """Gradient checkpointing in TRL, which takes less memory and more time. TRL's own default is on; ours is off."""
    out: str = "peers.json"
    """File of the results."""

    def __post_init__(self) -> None:
        """Raises ValueError for a size or file that is not allowed."""
        super().__post_init__()
        at_least(self, {"rounds": 1, "limit": 1, "trl_batch": 0, "trl_max_gb": 1})
        if not self.only:
            raise ValueError(f"only is empty: must be one or more of {', '.join(CONTESTANTS)}")
        if self.trl_batch and self.prompts * self.group % self.trl_batch:
            raise ValueError(f"trl_batch is {self.trl_batch}: must divide prompts x group, {self.prompts * self.group}")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, even if some contestants failed; 1 if all failed; 2 for a wrong option."""
    asked = options.parse(Peers, argv, "bench.peers")
    console, runs = Console(), {name: [] for name in asked.only}
    with tempfile.TemporaryDirectory() as place:
        try:
            check_out(asked.out)
            work = prepared(asked, place, asked.limit)
            for name in [*asked.only] * asked.rounds:
                console.print(f"{name} ...", style="dim")
                runs[name].append(measure(name, asked, work, runs[name]))
                write_whole(Path(asked.out), json.dumps(report(asked, runs), indent=1) + "\n")
        except (ValueError, OSError) as error:
            print(f"bench.peers: error: {error}", file=sys.stderr)
            return 2
    final = report(asked, runs)
    console.print(table(final))
    for line in notes(final):
        console.print(line, soft_wrap=True, highlight=False)
    return int(all("error" in entry for entry in final["contestants"].values()))


def measure(name: str, asked: Peers, work: dict, before: list[dict]) -> dict:
    """The numbers of one contestant, or its error. `before` holds the results of its earlier rounds."""
    if name == "trl":
        batch, tries = next(((run["batch"], run["tries"]) for run in before if "batch" in run), (asked.trl_batch, {}))
        outcome = _measure_trl(replace(asked, trl_batch=batch), work)
        return outcome | {"tries": tries | outcome["tries"]}
    return call(CONTESTANTS[name], {"work": work}, limit=asked.limit, threads=asked.threads)


def batches(asked: Peers) -> list[int]:
    """The batch sizes to try for TRL, the largest first. They must divide the sequences of a step."""
    sequences = asked.prompts * asked.group
    if asked.trl_batch:
        return [asked.trl_batch]
    return [batch for batch in TRL_BATCHES if sequences % batch == 0] or [sequences]


def _measure_trl(asked: Peers, work: dict) -> dict:
    """Measure TRL with the largest batch that fits. `tries` holds the errors of larger batches."""
    tries: dict[str, str] = {}
    deadline = time.monotonic() + asked.limit
    most = asked.trl_max_gb * 1e9
    for batch in batches(asked):
        left = max(1.0, deadline - time.monotonic())
        arguments = {"work": work, "batch": batch, "checkpointing": asked.trl_checkpointing}
        bound = {} if asked.trl_batch else {"max_bytes": most}
        outcome = call(CONTESTANTS["trl"], arguments, limit=left, threads=asked.threads, **bound)
        if "error" not in outcome and not asked.trl_batch and outcome["peak_bytes"] > most:
            outcome = {"error": f"peak of {outcome['peak_bytes'] / 1e9:.1f} GB", "out_of_memory": True}
        if not outcome.get("out_of_memory"):
            break
        tries[str(batch)] = outcome["error"]
    return outcome | {"tries": tries}


def median(runs: list[dict]) -> dict:
    """The round with the median seconds (of two, the faster); if all rounds failed, the error of the first."""
    done = sorted((run for run in runs if "error" not in run), key=lambda run: run[_phase(run)])
    chosen = done[(len(done) - 1) // 2] if done else runs[0]
    return chosen | {"rounds_s": [run.get(_phase(run)) for run in runs]}


def report(asked: Peers, runs: dict[str, list[dict]]) -> dict:
    """The content of the results file: machine, versions, settings, and all contestants with their ratio to ours."""
    results = {name: median(of_name) for name, of_name in runs.items() if of_name}
    done = [result for result in results.values() if "error" not in result]
    found = {name: done[0][name] if done else None for name in SETTING}
    settings = vars(asked) | found
    ours = results.get("ours", {})
    return {
        "machine": machine(asked.device),
        "versions": versions(),
        "settings": settings,
        "contestants": {name: _entry(result, ours) for name, result in results.items()},
    }


def _phase(result: dict) -> str:
    """The name of the seconds that are compared: the whole step or, without one, the rollout."""
    return "step_s" if result.get("step_s") else "rollout_s"


def _entry(result: dict, ours: dict) -> dict:
    """The numbers of a contestant, null where it has none, followed by its other entries."""
    phase = _phase(result)
    theirs, our_own = result.get(phase), ours.get(phase)
    entry = {name: result.get(name) for name in NUMBERS}
    entry["ratio"] = theirs / our_own if theirs and our_own else None
    return entry | {name: value for name, value in result.items() if name not in entry}


def table(written: dict) -> Table:
    """The results for a terminal."""
    heads = ("contestant", "rollout s", "learn s", "step s", "peak GB", "tokens/s", "ratio")
    drawn = Table(*heads)
    for name, entry in written["contestants"].items():
        peak = entry["peak_bytes"] and entry["peak_bytes"] / 1e9
        rate = entry.get("sampled_per_s")
        numbers = [entry["rollout_s"], entry["learn_s"], entry["step_s"], peak, rate, entry["ratio"]]
        drawn.add_row(name, *("" if number is None else f"{number:.4g}" for number in numbers))
    return drawn


def notes(written: dict) -> list[str]:
    """Sentences for what has no column in the table."""
    lines = [f"{written['settings']['out']}: the trunk has {written['settings']['trunk_tokens']} tokens"]
    for name, entry in written["contestants"].items():
        if "error" in entry:
            lines.append(f"{name}: {entry['error']}")
        if "batch" in entry:
            lines.append(f"{name}: {entry['batch']} sequences per pass; tried before: {entry['tries'] or 'none'}")
        if "learn_mfu" in entry:
            share, computed = entry["learn_mfu"], entry["tokens_computed"]
            lines.append(f"{name}: {computed:.0f} tokens computed, learning at {share:.0%} of the matrix peak")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
