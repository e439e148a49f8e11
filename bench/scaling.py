"""Measure how time and memory of our step grow with shots, group, new tokens and vocabulary, one at a time.

    python -m bench.scaling --out runs/scaling          scaling.json, scaling.md and scaling.png in that directory

Every point is a process of its own, so its peak memory is its own. The model has random weights, so its vocabulary can
be chosen. The results should show two things: time grows with the distinct tokens that are computed, and memory does
not grow with tokens x vocabulary, as it would with whole logits. Left out: peers, and more than one step per point.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich.console import Console

from bench.process import call, surroundings
from bench.work import Work, at_least, work_of
from grpo import options
from grpo.files import write_whole

BASE = {"shots": 4, "prompts": 2, "group": 8, "new_tokens": 64}
BASE_VOCABULARY = 32768
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
"""The default model: the embedded one, twice as wide. It has 4 million parameters without the vocabulary."""
TIMES = ("rollout_s", "learn_s", "step_s", "ms_per_token")
MEMORY = {
    "peak_bytes": ("peak", "o-"),
    "state_bytes": ("weights, optimiser", "-"),
    "logits_bytes": ("whole logits", "--"),
}
"""{column: (label, line style)} in the picture."""


@dataclass(frozen=True)
class Scaling:
    """Measure our step at many sizes, with one step per size after a warm-up."""

    model: str | None = None
    """Directory with architecture and tokenizer; weights are random. None: a small model."""
    shots: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    """Worked examples to measure with."""
    group: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Completions per prompt to measure with."""
    new_tokens: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Tokens per completion to measure with."""
    vocabulary: tuple[int, ...] = (32768, 65536, 98304, 131072, 152064)
    """Sizes of the vocabulary to measure with."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of matrix products."""
    limit: float = 600.0
    """Seconds that one point may take."""
    out: str = "runs/scaling"
    """Directory for table and picture."""

    def __post_init__(self) -> None:
        """Raises ValueError for a size that is not allowed."""
        at_least(self, {"shots": 0, "group": 2, "new_tokens": 1, "vocabulary": 1, "limit": 1})


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 0, 1 if a point failed, or 2 for a wrong option."""
    asked = options.parse(Scaling, argv, "bench.scaling")
    directory, console = Path(asked.out), Console()
    rows: list[dict] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = {**surroundings(), "settings": vars(asked) | {"base": BASE}}
        for row in measure(asked, console):  # a point takes minutes, so write after each one
            rows.append(row)
            write_whole(directory / "scaling.json", json.dumps(written | {"points": rows}, indent=1) + "\n")
            write_whole(directory / "scaling.md", markdown(rows))
        draw(rows).savefig(directory / "scaling.png", dpi=120)
    except OSError as error:
        print(f"bench.scaling: error: out is {asked.out!r}: {error}", file=sys.stderr)
        return 2
    console.print(markdown(rows), soft_wrap=True, highlight=False)
    return int(any("error" in row for row in rows))


def points(asked: Scaling) -> Iterator[tuple[str, int, dict, int]]:
    """Every point as (axis, value, sizes of the work, vocabulary). The base point is on every axis."""
    for axis in ("shots", "group", "new_tokens"):
        for value in getattr(asked, axis):
            yield axis, value, BASE | {axis: value}, BASE_VOCABULARY
    for value in asked.vocabulary:
        yield "vocabulary", value, BASE, value


def measure(asked: Scaling, console: Console) -> Iterator[dict]:
    """Yield a row for every point, with its numbers or its error. Equal points are measured once."""
    known: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as place:
        for axis, value, sizes, vocabulary in points(asked):
            key = json.dumps([sizes, vocabulary])
            if key not in known:
                console.print(f"{axis} {value} ...", style="dim")
                known[key] = _point(asked, Path(place) / str(vocabulary), sizes, vocabulary)
            yield {"axis": axis, "value": value} | known[key]


def _point(asked: Scaling, model: Path, sizes: dict, vocabulary: int) -> dict:
    """Measure one step in its own process."""
    if not model.exists():
        changes = {"vocab_size": vocabulary} | ({} if asked.model else SMALL)
        made = {"model": asked.model or "embedded", "directory": str(model), "changes": changes}
        failed = call("bench.models:make", made, limit=asked.limit)
        if "error" in failed:
            return failed
    work = Work(model=str(model), device=asked.device, dtype=asked.dtype, **sizes)
    step = call("bench.ours:ours", {"work": work_of(work)}, limit=asked.limit)
    if "error" in step:
        return step
    names = ("tokens_computed", "trunk_tokens", "rollout_s", "learn_s", "step_s", "peak_bytes", "state_bytes")
    return {name: step[name] for name in names} | {
        "ms_per_token": 1e3 * step["step_s"] / step["tokens_computed"],
        "logits_bytes": 4 * step["tokens_sampled"] * vocabulary,
    }


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table. A failed point shows its error."""
    heads = ("axis", "value", "tokens computed", "rollout s", "learn s", "step s", "ms a token")
    heads += ("peak MB", "of it weights, optimiser MB", "whole logits would take MB")
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for row in rows:
        cells = [row["axis"], f"{row['value']:,}"]
        if "error" in row:
            cells += [row["error"]] + [""] * (len(heads) - 3)
        else:
            cells += [f"{row['tokens_computed']:,.0f}", *(f"{row[name]:.3g}" for name in TIMES)]
            cells += [f"{row[name] / 1e6:,.0f}" for name in MEMORY]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict]) -> Figure:
    """Draw seconds of a step and scaled computed tokens in the upper row, and memory with whole logits in the lower."""
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3.6 * len(names), 6.4), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False)
    for name, above, below in zip(names, *grid, strict=True):
        good = [row for row in rows if row["axis"] == name and "error" not in row]
        if not good:
            continue
        values = [row["value"] for row in good]
        per_token = good[0]["step_s"] / good[0]["tokens_computed"]
        proportional = [row["tokens_computed"] * per_token for row in good]
        above.plot(values, [row["step_s"] for row in good], "o-", label="measured")
        above.plot(values, proportional, "--", color="grey", label="as tokens computed")
        for column, (label, style) in MEMORY.items():
            below.plot(values, [row[column] / 1e9 for row in good], style, label=label)
        above.set_title(name.replace("_", " "))
        for axes in (above, below):
            axes.set_ylim(0, None)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.legend(frameon=False)
    grid[0, 0].set_ylabel("seconds of a step")
    grid[1, 0].set_ylabel("GB")
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
