"""The results of a sweep as rows: accuracies averaged over seeds, with intervals; written as text, CSV and a picture.

Left out: tests of one setting against another. Intervals that overlap claim no difference.
"""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
from scipy import stats

from grpo.files import write_whole
from grpo.report import dot_plot, heat_map
from grpo.sweep.cells import Cell


def interval(values: list[float], ci95: list[float]) -> tuple[float, float, float, str]:
    """Mean and interval of one accuracy over seeds.

    An interval over seeds covers what a seed changes (exemplars, order, sampling), and not the choice of problems.

    Args:
        values: one accuracy per seed.
        ci95: interval of the first value, over problems.

    Returns:
        (mean, low, high, the kind of interval in words):

        - of three or more seeds: Student's t at 95 % for their mean;
        - of two: the smaller and the larger value;
        - of one, or of equal values (an untuned model without exemplars): `ci95`, Wilson's over problems.
    """
    mean, low, high, kind = center(values)
    if _equal(values):
        return mean, *ci95, "95 % over problems"
    return mean, max(0.0, low), min(1.0, high), kind


def center(values: list[float]) -> tuple[float, float, float, str]:
    """(mean, low, high, kind): Student's t at 95 % of three values or more, else the smallest and the largest."""
    mean = float(np.mean(values))
    if _equal(values):
        return mean, mean, mean, f"the same with {len(values)} seeds"  # no interval: it would have no width
    if len(values) == 2:
        return mean, min(values), max(values), "min..max of 2 seeds"
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half, f"95 % t over {len(values)} seeds"


def _equal(values: list[float]) -> bool:
    """Whether all are the same but for rounding."""
    return max(values) - min(values) < 1e-9


def tabulate(done: list[tuple[Cell, list[dict]]]) -> list[dict]:
    """One row per model, training setting and number of shots in the evaluation, over the finished seeds."""
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for cell, rows in done:
        for row in rows:
            groups.setdefault((row["model"], cell.trained_as, row["shots"]), []).append(row)
    table = []
    for (model, trained_as, shots), rows in groups.items():
        mean, low, high, kind = interval([row["accuracy"] for row in rows], rows[0]["ci95"])
        row = {"model": model, "train": trained_as, "eval_shots": shots, "seeds": len(rows), "n": rows[0]["n"]}
        table.append(row | {"accuracy": mean, "low": low, "high": high, "interval": kind})
    return sorted(table, key=lambda row: row["model"])


def differences(done: list[tuple[Cell, list[dict]]], first: str) -> list[dict]:
    """What each training setting gains over the one called `first`, tuned against tuned, seed by seed.

    Returns:
        One row per setting and number of shots: mean over the seeds that both have, and its interval; see `center`.
        Without two such seeds there is none.
    """
    accuracies: dict[tuple[int, str], dict[str, float]] = {}
    for cell, rows in done:
        for row in rows:
            if row["model"] == "tuned":
                accuracies.setdefault((row["shots"], cell.trained_as), {})[cell.setting.get("seed", "")] = row[
                    "accuracy"
                ]
    table = []
    for (shots, trained_as), of_seeds in accuracies.items():
        other = accuracies.get((shots, first), {})
        gains = [of_seeds[seed] - other[seed] for seed in of_seeds if seed in other]
        if trained_as == first or len(gains) < 2:
            continue
        mean, low, high, kind = center(gains)
        row = {"train": trained_as, "against": first, "eval_shots": shots, "seeds": len(gains)}
        table.append(row | {"difference": mean, "low": low, "high": high, "interval": kind})
    return table


def as_text(table: list[dict]) -> str:
    """The table as lines of plain text."""
    width = max(len(row["train"]) for row in table)
    lines = [f"model  {'trained with':<{width}}  eval shots  accuracy  interval"]
    for row in table:
        lines.append(
            f"{row['model']:<6} {row['train']:<{width}}  {row['eval_shots']:>10}  {row['accuracy']:>8.3f}  "
            f"{row['low']:.3f} .. {row['high']:.3f} ({row['interval']})"
        )
    return "\n".join(lines)


def as_markdown(table: list[dict], gains: list[dict]) -> str:
    """The tuned rows of the table as Markdown, with what each gains over the first setting; best first."""
    over_first = {(row["train"], row["eval_shots"]): row for row in gains}
    against = f"against {gains[0]['against']}" if gains else "difference"
    lines = [
        f"| trained with | shots | accuracy | interval | {against}, points | interval |",
        "|---|--:|--:|---|--:|---|",
    ]
    for row in sorted((row for row in table if row["model"] == "tuned"), key=lambda row: -row["accuracy"]):
        gain = over_first.get((row["train"], row["eval_shots"]))
        points = [100 * gain[name] for name in ("difference", "low", "high")] if gain else None
        over = "{:+.1f} | {:+.1f} .. {:+.1f}".format(*points) + f" ({gain['interval']})" if gain else "|"
        numbers = f"{row['accuracy']:.3f} | {row['low']:.3f} .. {row['high']:.3f} ({row['interval']})"
        lines.append(f"| {row['train']} | {row['eval_shots']} | {numbers} | {over} |")
    return "\n".join(lines) + "\n"


def write(directory: Path, cells: list[Cell], states: dict[str, str], table: list[dict], gains: list[dict]) -> None:
    """Write sweep.json, with the state of each cell by its name, and sweep.csv, .md and .png if the table has a row.

    Without a row those of an earlier sweep are removed.
    """
    runs = []
    for cell in cells:
        run = {"run": str(cell.directory), "setting": cell.setting, "state": states[cell.name]}
        runs.append(run | {"command": shlex.join(cell.command)})
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(
        directory / "sweep.json", json.dumps({"runs": runs, "table": table, "differences": gains}, indent=1) + "\n"
    )
    for name in ("sweep.csv", "sweep.md", "sweep.png"):
        (directory / name).unlink(missing_ok=True)
    if table:
        with open(directory / "sweep.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        write_whole(directory / "sweep.md", as_markdown(table, gains))
        draw = heat_map if len({row["eval_shots"] for row in table}) > 1 else dot_plot
        draw(table, directory / "sweep.png")
