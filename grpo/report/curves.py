"""The curves of runs: which metrics are drawn and in what order, the mean and band over seeds, and PNG files.

Left out: reading run directories and the page (`page.py`), and what the metrics mean (`docs/metrics.md`).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# (group, metric, title, note), in the order of the page. A row with `<term>` is drawn once per reward function.
_PANELS = (
    ("Rewards", "reward/mean", "Reward", "Weighted sum of the reward functions. This is optimised."),
    ("Rewards", "reward/<term>", "<term>", "One reward function, without its weight."),
    ("Rewards", "eval/accuracy", "Accuracy, validation", "Share of held-out problems answered right, greedily."),
    ("Rewards", "eval/lenient_accuracy", "Accuracy, last number", "As above, graded by the last number."),
    ("Rewards", "eval/format_rate", "Format, validation", "Share of these answers that have the format."),
    ("Rewards", "reward/flat_groups", "Flat groups", "Share of groups with equal rewards. They teach nothing."),
    ("Rewards", "reward/invalid", "Invalid", "Share of samples whose reward failed."),
    ("Rewards", "rollout/refills", "Refills", "How often further prompts were drawn in the step."),
    ("Rewards", "rollout/dropped_groups", "Dropped groups", "Drawn and left out: flat, or more than the step needs."),
    ("Rewards", "rollout/hard_problems", "Hard problems", "Share of the training set with a low last pass rate."),
    ("Rewards", "rollout/easy_problems", "Easy problems", "Share of the training set with a high last pass rate."),
    ("Completions", "completion/length", "Length", "Tokens, including the one that ended the completion."),
    ("Completions", "completion/truncated", "Truncated", "Share cut at max_new_tokens."),
    ("Policy", "policy/entropy", "Entropy", "Nats per token. Near 0 early in a run means collapse."),
    ("Policy", "policy/kl", "KL to the reference", "Nats per token."),
    ("Policy", "policy/old_kl", "KL of the step", "From the policy that sampled, nats per token."),
    ("Policy", "policy/ratio_mean", "Ratio", "New over old probability; 1 with one update per step."),
    ("Policy", "policy/clip_fraction", "Clip fraction", "Share of tokens where clipping took effect."),
    ("Policy", "policy/sampler_gap_mean", "Sampler gap, mean", "Nats between sampler and learner; only rounding."),
    ("Policy", "policy/sampler_gap_max", "Sampler gap, largest", "Nats, on the worst token of the step."),
    ("Policy", "policy/correction_ess", "Effective sample size", "Share that the correction's factors leave."),
    ("Policy", "policy/correction_max", "Correction, largest factor", "On one token of the step."),
    ("Policy", "policy/correction_masked", "Correction, masked", "Share of tokens with factor 0."),
    ("Policy", "policy/kl_coef", "Weight of the KL", "In the objective; moves if kl_target is set."),
    ("Policy", "policy/entropy_coef", "Weight of the entropy", "In the objective; moves if entropy_target is set."),
    ("Policy", "policy/entropy_share", "Share by entropy", "Tokens with a policy gradient: those of high entropy."),
    ("Optimiser", "optim/grad_norm", "Gradient norm", "Before it is scaled to max_grad_norm."),
    ("Optimiser", "optim/loss", "Loss", "Around 0. Its size says nothing about progress."),
    ("Optimiser", "optim/lr", "Learning rate", "As planned by schedule and warm-up."),
    ("Optimiser", "optim/updates", "Updates", "Made in the step; fewer than planned if kl_stop acts."),
    ("Optimiser", "optim/skipped", "Skipped updates", "Updates skipped because the gradient was not finite."),
    ("Time and memory", "time/step", "Time of a step", "Seconds, without evaluation and checkpoint."),
    ("Time and memory", "time/rollout", "Time of the rollout", "Seconds of sampling."),
    ("Time and memory", "time/learn", "Time of learning", "Seconds of forward and backward passes."),
    ("Time and memory", "time/reward", "Time of the rewards", "Seconds of reward functions."),
    ("Time and memory", "memory/peak_bytes", "Peak memory", "Bytes, the largest so far."),
    ("Time and memory", "tokens/sampled", "Tokens sampled", "Of all completions of the step."),
)
_FIXED = {metric for _, metric, *_ in _PANELS}


def mean_and_band(runs: Sequence[Sequence[dict]]) -> tuple[list[int], dict[str, dict[str, list[float | None]]]]:
    """Combine runs, given as the lines of each `metrics.jsonl`, into one curve per metric, at the steps that all have.

    Returns:
        The steps, and {metric: {"mean": values}}. For several runs there are also "low" and "high", the smallest and
        largest values. A value is None where a run has none. Values are rounded to six digits.
    """
    lines = [{line["step"]: line for line in run} for run in runs]
    steps = sorted(set.intersection(*map(set, lines)))
    metrics = {}
    for name in dict.fromkeys(name for run in runs for line in run for name in line if name != "step"):
        columns = [[line[step].get(name) for step in steps] for line in lines]
        values = np.array(columns, dtype=float)  # None becomes NaN
        metrics[name] = {"mean": _short(values.mean(0))}
        if len(runs) > 1:
            metrics[name] |= {"low": _short(values.min(0)), "high": _short(values.max(0))}
    return steps, metrics


def _short(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.6g}") for value in values]


def panels_of(all_metrics: Sequence[dict[str, dict]]) -> list[dict[str, str]]:
    """The charts: {"group", "metric", "title", "note"} for each metric that has a value in some series.

    Args:
        all_metrics: of each series, as `mean_and_band` returns them.
    """
    curves = [(name, curve["mean"]) for metrics in all_metrics for name, curve in metrics.items()]
    names = dict.fromkeys(name for name, values in curves if any(value is not None for value in values))
    terms = [name for name in names if name.startswith("reward/") and name not in _FIXED]
    panels = []
    for group, metric, title, note in _PANELS:
        for name in terms if metric == "reward/<term>" else [metric]:
            own = title.replace("<term>", name.removeprefix("reward/"))
            if name in names:
                panels.append({"group": group, "metric": name, "title": own, "note": note})
    return panels


def draw(panels: Sequence[dict], all_series: Sequence[dict], directory: Path) -> None:
    """Write `<group>.png` for each group of panels, with the same curves as the page.

    Args:
        panels: as `panels_of` returns them.
        all_series: {"name", "steps", "metrics"}, the last two as `mean_and_band` returns them.
        directory: for the files; created if missing.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    directory.mkdir(exist_ok=True)
    for group in dict.fromkeys(panel["group"] for panel in panels):
        members = [panel for panel in panels if panel["group"] == group]
        rows = math.ceil(len(members) / 3)
        figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
        grid = figure.subplots(rows, 3, squeeze=False).flatten()
        for axes, panel in zip(grid, members, strict=False):
            for i, series in enumerate(all_series):
                curve = series["metrics"].get(panel["metric"], {"mean": [None] * len(series["steps"])})
                points = [(x, *ys) for x, *ys in zip(series["steps"], *curve.values(), strict=True) if None not in ys]
                xs, means, *band = zip(*points, strict=True) if points else ((), ())
                axes.plot(xs, means, color=f"C{i}", label=series["name"], marker="." if len(xs) < 30 else None)
                if band:
                    axes.fill_between(xs, *band, color=f"C{i}", alpha=0.2, linewidth=0)
            axes.set_title(panel["title"], loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
        for axes in grid[len(members) :]:
            axes.set_axis_off()
        if len(all_series) > 1:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
        figure.savefig(directory / f"{group.lower().replace(' ', '_')}.png", dpi=110)


def heat_map(table: list[dict], path: Path) -> None:
    """Draw accuracy in percent: one row per training setting, one column per number of shots in the evaluation.

    Rows of the untuned model follow: a single row if it is the same for every setting.

    Args:
        table: rows as `tabulate` of `grpo/sweep/table.py` makes them.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    shots = sorted({row["eval_shots"] for row in table})
    cells = {(row["model"], row["train"], row["eval_shots"]): row for row in table}
    settings = list(dict.fromkeys(row["train"] for row in table))
    rows = [("tuned", setting, setting) for setting in settings]
    base = [[cells["base", setting, n]["accuracy"] for n in shots] for setting in settings]
    if all(row == base[0] for row in base):
        rows.append(("base", settings[0], "untuned"))
    else:
        rows += [("base", setting, f"untuned, {setting}") for setting in settings]
    accuracy = np.array([[100 * cells[model, setting, n]["accuracy"] for n in shots] for model, setting, _ in rows])
    figure = Figure(figsize=(2.5 + 1.5 * len(shots), 1.6 + 0.7 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(accuracy, cmap="viridis", aspect="auto")
    middle = (accuracy.min() + accuracy.max()) / 2
    for (i, j), value in np.ndenumerate(accuracy):
        row = cells[rows[i][0], rows[i][1], shots[j]]
        text = f"{value:.1f}\n[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if value < middle else "black")
    axes.set_xticks(range(len(shots)), shots)
    axes.set_yticks(range(len(rows)), [label for *_, label in rows])
    axes.set_xlabel("worked examples in the evaluation's prompt")
    axes.set_ylabel("trained with")
    kinds = ", ".join(sorted({row["interval"] for row in table}))
    problems = ", ".join(str(n) for n in sorted({row["n"] for row in table}))
    axes.set_title(f"accuracy in %, {problems} problems [{kinds}]", fontsize=9)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=150)


def dot_plot(table: list[dict], path: Path) -> None:
    """Draw accuracy in percent with its interval: one row per training setting, in the table's order, then the untuned.

    Args:
        table: rows as `tabulate` of `grpo/sweep/table.py` makes them, of one number of shots.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    tuned, base = ([row for row in table if row["model"] == model] for model in ("tuned", "base"))
    labels = [row["train"] for row in tuned] + ["untuned"] * bool(base)
    rows = tuned + base[:1]
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        low, mean, high = (100 * row[name] for name in ("low", "accuracy", "high"))
        color = f"C{int(row['model'] == 'base')}"
        axes.plot([low, high], [place, place], color=color, alpha=0.5, linewidth=2)
        axes.plot([mean], [place], "o", color=color, markersize=5)
    axes.axvline(100 * rows[0]["accuracy"], color="0.6", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    kinds = ", ".join(sorted({row["interval"] for row in tuned}))
    axes.set_title(f"accuracy in %, {rows[0]['n']} problems [{kinds}]", loc="left", fontsize=9)
    figure.savefig(path, dpi=110)
