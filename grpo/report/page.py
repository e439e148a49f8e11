"""Read run directories and write the report: one HTML file for one or more runs, and the curves as PNG files.

    python -m grpo.report RUN [RUN ...] [--out FILE]

The template is `page.html` beside this file. It draws the JSON that is embedded in it and needs no network. Left out:
which curves there are (`curves.py`), and running models or graders again.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from grpo.config import Config
from grpo.evaluation import headline
from grpo.evaluation.graders import ALSO_CALLED
from grpo.files import check_kinds, read_metrics, read_object, write_whole
from grpo.report import curves

TEMPLATE = Path(__file__).with_name("page.html")
ROLLOUT_BYTES = 4_000_000
"""The approximate bytes of transcripts in a page, over all runs. Of larger runs it shows a selection of steps."""
FEWEST_STEPS = 8
"""A page shows transcripts of at least this many steps per run, with fewer prompts each if necessary."""

GROUP = {"question": str, "answer": str, "prompt_index": int}
COMPLETION = {"completion": str, "rewards": dict, "reward": int | float | None, "advantage": int | float | None}
COMPLETION |= {"finished": bool, "tokens": list, "logprobs": list}
"""The fields of a line in `rollouts/`, and of each of its completions, that the page needs."""

# Runs that differ only in these options are one experiment, drawn as one line with a band.
_SAME_EXPERIMENT = frozenset(
    ("seed", "run_name", "out_dir", "resume", "ddp_timeout", "device", "tracker", "max_tokens_per_microbatch")
    + ("activation_checkpointing", "compile", "checkpoint_every", "keep_checkpoints", "eval_batch")
)


@dataclass(frozen=True)
class Run:
    """The content of a run directory, without transcripts."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, str]
    metrics: list[dict[str, float | None]]
    evaluation: dict | None

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and, in `curves/` beside it, one PNG file for each group of metrics.

    Args:
        runs: run directories, finished or not. Runs that differ only in the seed become one curve with mean and band.
        out: file to write; None: `report.html` in the run or, for several runs, in the parent of the first.

    Returns:
        The path of the page.

    Raises:
        ValueError: `runs` is empty, or one of them is not a run directory.
        OSError: a file cannot be read or written.
    """
    if not runs:
        raise ValueError("runs is empty: name at least one run directory")
    loaded = [read_run(Path(path)) for path in dict.fromkeys(runs)]
    out = out or (loaded[0].path if len(loaded) == 1 else loaded[0].path.resolve().parent) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    page = build(loaded)
    write_whole(out, render(page))
    curves.draw(page["panels"], page["series"], out.parent / "curves")
    return out


def read_run(path: Path) -> Run:
    """Read a run directory. The run may still be going on.

    Raises:
        ValueError: config.yaml or metrics.jsonl is missing, or a file has other content than a run writes.
        OSError: a file cannot be read.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a run directory: it has no {name}")
    config = _config(path / "config.yaml")
    metrics = read_metrics(path / "metrics.jsonl")
    environment = _environment(path / "environment.json")
    evaluations = [headline.read_result(file) for file in sorted(path.glob("eval*/eval.json"))]
    own = config.get("eval_correct")
    richest = max(evaluations, key=lambda found: _richness(found, own), default=None)
    return Run(path, config, environment, metrics, richest)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"{file} must hold `name: value` lines")
    return config


def _environment(file: Path) -> dict[str, str]:
    """The environment of a run. Values that changed when it was resumed are listed in order of the starts."""
    if not file.exists():
        return {}
    last = read_object(file.read_bytes(), file, {})
    try:
        starts = [*last.pop("earlier", []), last]
        return {name: ", then ".join(dict.fromkeys(_text(start.get(name)) for start in starts)) for name in last}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold what a run writes ({type(error).__name__}: {error})") from error


def _richness(found: dict, own: str | None) -> tuple[bool, int, int]:
    """Whether an `eval.json` was graded as the run is, then how much it holds."""
    by_its_own = not found["cells"] or headline.main_grader(found, own) in (own, ALSO_CALLED.get(own))
    return by_its_own, len(found["split"]), len(found["cells"])


def build(runs: Sequence[Run]) -> dict:
    """Everything that the page shows, as JSON values."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        experiment = {name: value for name, value in run.config.items() if name not in _SAME_EXPERIMENT}
        groups.setdefault(json.dumps(experiment, sort_keys=True, default=str), []).append(run)
    firsts = [group[0].config for group in groups.values()]
    differing = [row["name"] for row in _table(firsts, without=_SAME_EXPERIMENT) if row["differs"]]
    series = [_series(group, differing) for group in groups.values()]
    return {
        "title": ", ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        "series": series,
        "panels": curves.panels_of([one["metrics"] for one in series]),
        "evaluations": [_evaluation(run) for run in runs if run.evaluation],
        "options": _table([run.config for run in runs], vars(Config()), without=("run_name", "out_dir")),
        "environment": _table([run.environment for run in runs]),
        "runs": [run.name for run in runs],
        "rollouts": [found for run in runs if (found := _rollouts(run, ROLLOUT_BYTES / len(runs)))],
    }


def _evaluation(run: Run) -> dict:
    """What the page shows of an `eval.json`, with a claim (None without base and tuned) and what failed in words."""
    pair = headline.main_pair(run.evaluation, run.config)
    shown = {"run": run.name, **run.evaluation, "cells": headline.readings(run.evaluation)}
    return shown | {"claim": pair and headline.claim(pair), "failures": headline.failures(run.evaluation)}


def render(page: dict) -> str:
    """The HTML of a page. The JSON contains no `<`, `>` or `&`, so text from a model cannot become markup."""
    data = json.dumps(page, allow_nan=False, separators=(",", ":"))  # ASCII, so no lone surrogates or line separators
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    before, rest = TEMPLATE.read_text(encoding="utf-8").split("{{title}}")
    middle, after = rest.split("{{data}}")
    return before + html.escape(page["title"]) + middle + data + after


def _series(runs: Sequence[Run], differing: Sequence[str]) -> dict:
    """Runs that differ only in the seed, as one curve. Its name lists the options that differ from other curves."""
    steps, metrics = curves.mean_and_band([run.metrics for run in runs])
    seeds = ", ".join(str(run.config.get("seed")) for run in runs)
    options = ", ".join(f"{name} {_text(runs[0].config.get(name))}" for name in differing[:3])
    return {
        "name": runs[0].name if len(runs) == 1 else f"{options or 'all runs'} (seeds {seeds})",
        "runs": [run.name for run in runs],
        "steps": steps,
        "metrics": metrics,
        "facts": _facts(runs, metrics.get("reward/mean", {}).get("mean", [])),
    }


def _facts(runs: Sequence[Run], rewards: Sequence[float | None]) -> list[list[str]]:
    """The numbers at the top of the page, each as [label, value, note]. For several runs they are means."""
    evaluated = [run for run in runs if run.evaluation]
    facts = _gain(evaluated) + _published_gain(evaluated)
    kept = [value for value in rewards if value is not None]
    if kept:
        tenth = math.ceil(len(kept) / 10)
        first, last = fmean(kept[:tenth]), fmean(kept[-tenth:])
        value = f"{first:.2f} \N{RIGHTWARDS ARROW} {last:.2f}"
        facts.append(["Training reward", value, "means of the first and last tenth"])
    lines = [line for run in runs for line in run.metrics]
    seconds = sum(line.get("time/step") or 0.0 for line in lines)
    tokens = sum(line.get("tokens/sampled") or 0 for line in lines)
    steps = " + ".join(str(len(run.metrics)) for run in runs)
    return [*facts, ["Steps", steps, f"{_duration(seconds)}, {tokens:,} tokens sampled"]]


def _gain(runs: Sequence[Run]) -> list[list[str]]:
    """The accuracies of base and tuned model, and their difference."""
    found = [(run.evaluation, headline.main_pair(run.evaluation, run.config)) for run in runs]
    found = [(evaluation, pair) for evaluation, pair in found if pair]
    if not found:
        return []
    base, tuned = map(fmean, zip(*(headline.accuracies(*each) for each in found), strict=True))
    pairs = [pair for _, pair in found]
    gains = [pair["difference"] for pair in pairs]
    low, high = pairs[0]["ci95"] if len(pairs) == 1 else (min(gains), max(gains))
    span = "95 % interval" if len(pairs) == 1 else f"{len(pairs)} runs:"
    value = f"{100 * base:.1f} \N{RIGHTWARDS ARROW} {100 * tuned:.1f} %"
    return [
        ["Accuracy, base to tuned", value, headline.where(pairs[0])],
        ["Gain", f"{points(fmean(gains))} points", f"{span} {points(low)} to {points(high)}"],
    ]


def _published_gain(runs: Sequence[Run]) -> list[list[str]]:
    """The gain that the published evaluation measures, and its parts."""
    entries = [headline.entry_of_run(run.evaluation["split"], run.config) for run in runs]
    entries = [entry for entry in entries if entry]
    if not entries:
        return []
    names = ("total", "stopping", "grader", "left")
    total, stopping, grader, left = (points(fmean([entry[name] for entry in entries])) for name in names)
    note = f"published evaluation: {stopping} learning to stop, {grader} grader's errors, {left} better answers"
    return [["Published gain", f"{total} points", note]]


def points(share: float) -> str:
    """A difference of two shares in percentage points, with a typographic minus sign."""
    return headline.points(share).replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _table(columns: Sequence[dict], defaults: dict | None = None, without: Sequence[str] = ()) -> list[dict]:
    """Options as rows: the value in each run as text, whether runs differ, and whether a value is not the default."""
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column if name not in without):
        values = [_text(column.get(name)) for column in columns]
        usual = _text(defaults[name]) if defaults and name in defaults else None
        changed = usual is not None and set(values) != {usual}
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1, "changed": changed})
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _rollouts(run: Run, budget: float) -> dict | None:
    """Transcripts of a run: as many steps and prompts as fit into about `budget` bytes."""
    files = sorted(run.path.glob("rollouts/step_[0-9]*.jsonl"))
    if not files:
        return None
    average = sum(file.stat().st_size for file in files) / len(files)
    count = min(len(files), max(FEWEST_STEPS, int(budget / max(1.0, average))))
    chosen = [files[round(i * (len(files) - 1) / max(1, count - 1))] for i in range(count)]
    steps = [_transcripts(file, budget / count) for file in chosen]
    left_out = [f"{count} of {len(files)} steps"] if count < len(files) else []
    if any(len(step["groups"]) < step["prompts"] for step in steps):
        fewest = min(len(step["groups"]) for step in steps)
        left_out.append(f"at least the first {fewest} prompts of each")
    return {"run": run.name, "steps": steps, "left_out": ", ".join(left_out)}


def _transcripts(path: Path, budget: float) -> dict:
    """The first groups of a step, until `budget` bytes are used up. `prompts` counts all groups."""
    groups: dict[int, dict] = {}
    seen, used = set(), 0
    with path.open("rb") as file:
        for i, line in enumerate(file, start=1):
            where = f"{path}, line {i}"
            found = read_object(line, where, GROUP)
            found.setdefault("completions", [found])  # runs of earlier versions have a line for each completion
            check_kinds(found, where, {"completions": list})
            index = found["prompt_index"]
            if index not in seen and used < budget:
                shared = {name: found.get(name) for name in ("question", "answer", "prompt")}
                groups[index] = shared | {"rows": []}
            seen.add(index)
            if index in groups:
                used += len(line)
                for row in found["completions"]:
                    check_kinds(row, where, COMPLETION)
                    groups[index]["rows"].append({name: row[name] for name in COMPLETION})
    return {"step": int(path.stem.removeprefix("step_")), "prompts": len(seen), "groups": list(groups.values())}
