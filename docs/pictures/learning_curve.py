"""The picture on the README's first screen: accuracy of the demo on held-out problems while it learns.

    for seed in 0 1 2; do python train.py --run_name curve$seed --seed $seed --eval_every 2 --final_eval False; done
    python docs/pictures/learning_curve.py runs/curve0 runs/curve1 runs/curve2

One line a seed, with Wilson 95 % intervals over 200 validation problems. Left out: all other curves (`grpo.report`).
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from grpo.config import from_yaml
from grpo.evaluation.statistics import wilson


def main(runs: list[str]) -> None:
    """Write `learning_curve.png` beside this file."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        seed = from_yaml(Path(run, "config.yaml")).seed
        lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        measured = [line for line in lines if line.get("eval/n")]
        steps = [line["step"] for line in measured]
        bands = [wilson(line["eval/correct"], line["eval/n"]) for line in measured]
        (curve,) = axes.plot(steps, [line["eval/accuracy"] for line in measured], marker=".", label=f"seed {seed}")
        axes.fill_between(steps, *zip(*bands, strict=True), color=curve.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="accuracy, held-out problems", ylim=(0, 1.02))
    axes.set_title("The demo learns to work step by step (greedy, 95 % intervals)", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(Path(__file__).with_name("learning_curve.png"), dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
