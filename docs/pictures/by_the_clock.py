"""The picture of training rewards against minutes, for runs of `train.py` and of `bench.clock`: docs/results.md.

    python docs/pictures/by_the_clock.py docs/pictures/by_the_clock.png "What is compared" runs/ours runs/trl

A point is the mean reward of a step, at the minute at which it ended, as long as all runs last. The time of evaluations
and of loading is not counted. A line is the mean over five steps. Left out: accuracy on held-out problems
(`learning_curve.py`).
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SMOOTHED = 5
"""Steps of a running mean; fewer at both ends."""


def main(file: str, title: str, *runs: str) -> None:
    """Write a picture of runs, which are labelled by the names of their directories."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    noted = [[json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()] for run in runs]
    ends = [np.cumsum([line["time/step"] for line in lines]) / 60 for lines in noted]
    shortest = min(minutes[-1] for minutes in ends)
    for run, lines, minutes in zip(runs, noted, ends, strict=True):
        lines = [line for line, end in zip(lines, minutes, strict=True) if end <= shortest]
        minutes, rewards = minutes[: len(lines)], np.array([line["reward/mean"] for line in lines])
        around = [rewards[max(0, i - SMOOTHED // 2) : i + SMOOTHED // 2 + 1].mean() for i in range(len(rewards))]
        (curve,) = axes.plot(minutes, around, label=f"{Path(run).name}, {len(lines)} steps")
        axes.plot(minutes, rewards, ".", color=curve.get_color(), alpha=0.4)
    axes.set(xlabel="minutes of training", ylabel="mean reward of a step", xlim=(0, None))
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
