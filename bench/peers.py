"""Compare our step with what a researcher would otherwise use, on the same work: seconds, memory, and ratio to ours.

    python -m bench.peers --model DIR --train FILE --shots 8 --prompts 4 --group 8 --new-tokens 64 --out peers.json

The contestants:

- `ours`;
- `trl`: TRL's GRPOTrainer (bench/requirements.txt);
- `hf_generate` and `hf_continuous`: Hugging Face's `generate` and `generate_batch`, for the rollout only;
- `floor`: the least that this machine would need.

Each runs in its own process. If one fails, the results say why, and the others still run. docs/benchmarks.md explains
the results. Left out: more than one GPU.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from bench.process import call, surroundings
from bench.work import Work, at_least, work_of
from grpo import options
from grpo.files import write_whole

CONTESTANTS = {
    "ours": "bench.ours:ours",
    "trl": "bench.theirs:trl",
    "hf_generate": "bench.theirs:hf_generate",
    "hf_continuous": "bench.theirs:hf_continuous",
    "floor": "bench.floor:floor",
}
NUMBERS = ("rollout_s", "learn_s", "step_s", "peak_bytes", "tokens_sampled")
SETTING = ("gpu", "trunk_tokens", "prompt_tokens", "threads")
"""What contestants report that is the same for all."""


@dataclass(frozen=True)
class Peers(Work):
    """Compare our step with TRL's, our sampling with Hugging Face's, and both with the least that is possible."""

    only: tuple[Literal["ours", "trl", "hf_generate", "hf_continuous", "floor"], ...] = tuple(CONTESTANTS)
    """Contestants to run, in this order. Of one that is named several times, the run with the median seconds counts."""
    limit: float = 7200.0
    """Seconds that one run of a contestant may take."""
    trl_batch: int = 8
    """Sequences in TRL's forward and backward pass. More are faster, as long as the memory suffices."""
    trl_checkpointing: bool = False
    """Gradient checkpointing in TRL, which takes less memory and more time. TRL's own default is on; ours is off."""
    out: str = "peers.json"
    """File of the results."""

    def __post_init__(self) -> None:
        """Raises ValueError for a size or file that is not allowed."""
        super().__post_init__()
        at_least(self, {"limit": 1, "trl_batch": 1})
        if not self.only:
            raise ValueError(f"only is empty: must be one or more of {', '.join(CONTESTANTS)}")
        if self.one_in and set(self.only) != {"ours"}:
            raise ValueError(f"one_in is {self.one_in}: no other contestant can do that; use it with --only ours")
        if "trl" in self.only and self.prompts * self.group % self.trl_batch:
            raise ValueError(f"trl_batch is {self.trl_batch}: must divide prompts x group, {self.prompts * self.group}")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, even if some contestants failed; 1 if all failed; 2 for a wrong option."""
    asked = options.parse(Peers, argv, "bench.peers")
    console = Console()
    runs: dict[str, list[dict]] = {name: [] for name in asked.only}
    with tempfile.TemporaryDirectory() as place:
        try:
            check_out(asked.out)
            work = prepared(asked, place)
            for name in asked.only:
                console.print(f"{name} ...", style="dim")
                runs[name].append(measure(name, asked, work))
                final = report(asked, runs)
                if any("error" not in entry for entry in final["contestants"].values()):
                    write_whole(Path(asked.out), json.dumps(final, indent=1) + "\n")
        except (ValueError, OSError) as error:
            print(f"bench.peers: error: {error}", file=sys.stderr)
            return 2
    console.print(table(final))
    for line in notes(final):
        console.print(line, soft_wrap=True, highlight=False)
    return int(all("error" in entry for entry in final["contestants"].values()))


def check_out(out: str) -> None:
    """Raise ValueError if no file can be written there. Check before the work, which would be lost otherwise."""
    path = Path(out)
    try:
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"out is {out!r}: must be a file that can be written ({error.strerror})") from None


def prepared(asked: Peers, place: str) -> dict:
    """The argument of all contestants. A model with random weights is made in `place`, by another process.

    Raises:
        ValueError: that model cannot be made.
    """
    work = work_of(asked)
    if asked.random_weights:
        made = {"model": asked.model, "directory": place, "tokenizer": asked.tokenizer, "seed": asked.seed}
        failed = call("bench.models:make", made, limit=asked.limit).get("error")
        if failed:
            raise ValueError(failed)
        work["model"] = place
    return work


def measure(name: str, asked: Peers, work: dict) -> dict:
    """The numbers of one contestant, or its error."""
    arguments = {"work": work}
    if name == "trl":
        arguments |= {"batch": asked.trl_batch, "checkpointing": asked.trl_checkpointing}
    return call(CONTESTANTS[name], arguments, limit=asked.limit, threads=asked.threads)


def median(runs: list[dict]) -> dict:
    """The run with the median seconds (of two, the faster); if all failed, the error of the first."""
    done = sorted((run for run in runs if "error" not in run), key=lambda run: run[_phase(run)])
    chosen = done[(len(done) - 1) // 2] if done else runs[0]
    return chosen | {"runs_s": [run.get(_phase(run)) for run in runs]}


def report(asked: Peers, runs: dict[str, list[dict]]) -> dict:
    """The content of the results file: machine, versions, settings, and all contestants with their ratio to ours."""
    results = {name: median(of_name) for name, of_name in runs.items() if of_name}
    done = [result for result in results.values() if "error" not in result]
    found = {name: done[0][name] if done else None for name in SETTING}
    ours = results.get("ours", {})
    contestants = {name: _entry(result, ours) for name, result in results.items()}
    return {**surroundings(), "settings": vars(asked) | found, "contestants": contestants}


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
            lines.append(f"{name}: {entry['batch']} sequences per pass")
        if "padded" in entry:
            sampled, padded = entry["tokens_sampled"], entry["padded"]
            lines.append(f"{name}: {sampled:.0f} tokens sampled, {padded:.0f} if every row were as long as the longest")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
