"""The pictures of accuracy on held-out problems while a model learns: README's first screen, docs/results.md.

    for seed in 0 1 2; do python train.py --run_name seed=$seed --seed $seed --eval_every 2 --final_eval False; done
    python docs/pictures/learning_curve.py docs/pictures/learning_curve.png "The demo learns to work step by step" \
        runs/seed=0 runs/seed=1 runs/seed=2

One line a run, with Wilson 95 % intervals over its validation problems. Left out: all other curves (`grpo.report`).
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from grpo.evaluation.statistics import wilson


def main(file: str, title: str, *runs: str) -> None:
    """Write a picture of runs, which are labelled by the names of their directories."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        measured = [line for line in lines if line.get("eval/n")]
        steps = [line["step"] for line in measured]
        bands = [wilson(line["eval/correct"], line["eval/n"]) for line in measured]
        (curve,) = axes.plot(steps, [line["eval/accuracy"] for line in measured], marker=".", label=Path(run).name)
        axes.fill_between(steps, *zip(*bands, strict=True), color=curve.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="accuracy, held-out problems", ylim=(0, 1.02))
    axes.set_title(f"{title} (greedy, 95 % intervals)", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
