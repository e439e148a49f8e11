"""Put an `eval.json` into words: the table, what can be claimed, where a gain comes from, and what failed.

The terminal and the report page both use these texts. Left out: grading and intervals (`grading.py`). Every number here
comes from the file.
"""

from pathlib import Path

from grpo.evaluation.graders import GRADERS
from grpo.files import check_kinds, read_object

ALSO_CALLED = {"gsm8k.correctness": "marker", "gsm8k_published.correctness": "marker_first"}
"""Reward functions that are graders by another name."""


def points(share: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def shots(number: int) -> str:
    """A number of worked examples, in words."""
    return f"{number} shot" if number == 1 else f"{number} shots"


def where(pair: dict) -> str:
    """What was compared, in words."""
    return f"grader {pair['grader']}, stop {pair['stop']}, {shots(pair['shots'])}, n = {pair['n']:,}"


def claim(pair: dict) -> str:
    """One sentence: what can be claimed from a pair of `eval.json` at this sample size.

    A difference is claimed if its interval excludes 0 and, where there is a test, p < 0.05. The test is needed because
    the bootstrap over few problems gives too narrow an interval.
    """
    (low, high), p = pair["ci95"], pair["p_value"]
    tested = "" if p is None else ", p < 0.001" if p < 0.001 else f", p = {p:.2g}"
    measured = f"{points(pair['difference'])} points, 95 % interval {points(low)} to {points(high)}{tested}"
    if low <= 0 <= high:
        size = f"at this sample size it would have to be larger than about {50 * (high - low):.1f} points"
        return f"No difference can be claimed ({where(pair)}): measured {measured}; {size}."
    if p is not None and p >= 0.05:
        size = "too few answers differ to rule out chance"
        return f"No difference can be claimed ({where(pair)}): measured {measured}; {size}."
    return f"The tuned model is {'better' if low > 0 else 'worse'} ({where(pair)}): {measured}."


def main_grader(found: dict, own: str | None = None) -> str:
    """The grader whose verdict counts.

    Args:
        found: an `eval.json`.
        own: what decides in the run that it belongs to (`eval_correct`); None: no run is known.

    Returns:
        `own`, where the file has it. Else the first grader that was asked for; but `last_number`, which neither format
        nor running on changes, if that is asked for too and the first is a grader of numbers, not a reward function.
    """
    asked = [entry["grader"] for entry in found.get("cells") or found["paired"]]
    for name in (own, ALSO_CALLED.get(own)):
        if name in asked:
            return name
    return "last_number" if "last_number" in asked and asked[0] in GRADERS else asked[0]


def main_pairs(found: dict, own: str | None = None) -> list[dict]:
    """The pair that counts at each number of shots: by `main_grader` on the cut text, or as near as the file has it."""
    if not found["paired"]:
        return []
    main, best = main_grader(found, own), {}
    for pair in sorted(found["paired"], key=lambda p: (p["stop"] == "stop_string", p["grader"] == main)):
        best[pair["shots"]] = pair  # the last is the nearest
    return [best[number] for number in sorted(best)]


def entry_of_run(entries: list[dict], config: dict) -> dict | None:
    """The entry for the run's own `num_shots`, else the first; None if there is none."""
    return next((entry for entry in entries if entry["shots"] == config.get("num_shots")), next(iter(entries), None))


def accuracies(found: dict, pair: dict) -> tuple[float, float]:
    """(accuracy of base, accuracy of tuned), with the shots, stop policy and grader of the pair."""
    key = ("shots", "stop", "grader")
    graded = {c["model"]: c["accuracy"] for c in readings(found) if all(c[name] == pair[name] for name in key)}
    return graded["base"], graded["tuned"]


def readings(found: dict) -> list[dict]:
    """The cells; where `last_number` is not a grader among them, with a cell for each lenient accuracy, which it is.

    Where golds are no numbers there is no lenient accuracy.
    """
    cells = []
    for cell in found["cells"]:
        cells.append(cell)
        asked = any(other["grader"] == "last_number" for other in found["cells"])
        if not asked and cell["lenient_accuracy"] is not None:
            lenient = {"accuracy": cell["lenient_accuracy"], "ci95": cell["lenient_ci95"], "grader": "last_number"}
            of_the_grader = ("correct", "failures", "pass_at", "majority")
            cells.append({name: value for name, value in cell.items() if name not in of_the_grader} | lenient)
    return list({(c["model"], c["shots"], c["stop"], c["grader"]): c for c in cells}.values())


def failures(found: dict) -> list[str]:
    """A sentence for each reward function that failed on texts, or paid for a part of the answer, in some cell."""
    said = {}
    for cell in found["cells"]:
        texts, here = cell["n"] * cell.get("samples", 1), f"{cell['model']}, {shots(cell['shots'])}, {cell['stop']}"
        for name, failed in cell.get("failures", {}).items():
            said[name, here] = (
                f"{name} failed on {failed['texts']} of {texts} texts ({here}), which count as wrong; the first: "
                f"{failed['first']}"
            )
        for name, part in cell.get("partial", {}).items():
            said[name, "partial", here] = (
                f"{name} gave {part['texts']} of {texts} texts ({here}) a part of its credit, at most "
                f"{part['highest']:g}; they do not count, because {part['needed']:g} is needed"
            )
    return list(said.values())


def table_of(file: Path) -> str:
    """The table of an `eval.json`.

    Raises:
        ValueError: it was written by another version, or is damaged; names the file and the field.
    """
    found = read_result(file)
    try:
        return table(found)
    except (LookupError, TypeError, AttributeError) as error:
        what = f"{file} does not hold what this version writes ({type(error).__name__}: {error})"
        raise ValueError(f"{what}; delete it, to evaluate again") from error


def read_result(file: Path) -> dict:
    """The content of an `eval.json`; ValueError names the file and the field that is not as it should be."""
    found = read_object(file.read_bytes(), file, dict.fromkeys(("cells", "paired", "split", "format"), list))
    kinds = {"model": str, "shots": int, "stop": str, "grader": str, "accuracy": float | int, "ci95": list}
    for cell in found["cells"]:
        if not isinstance(cell, dict):
            raise ValueError(f"{file}: a cell is {cell!r:.60}: must be an object")
        check_kinds(cell, file, kinds)
    return found


def table(found: dict) -> str:
    """The cells as lines of plain text, then where the gain comes from, what can be claimed, and what failed."""
    names = ("model  shots", "stop       ", "grader              n", "accuracy  95 %           ")
    lines = ["  ".join((*names, "lenient  format  finished  tokens"))]
    for cell in found["cells"]:
        lenient = "-" if cell["lenient_accuracy"] is None else f"{cell['lenient_accuracy']:.3f}"
        lines.append(
            f"{_key(cell)} {cell['n']:>4}  {cell['accuracy']:>8.3f}  {_interval(cell['ci95']):<15}  "
            f"{lenient:>7}  {cell['format_rate']:>6.3f}  {cell['finished']:>8.3f}  "
            f"{cell['mean_tokens']:>6.1f}"
        )
    for cell in found["cells"]:
        if "pass_at" in cell:
            rates = {f"pass@{size}": rate for size, rate in cell["pass_at"].items()}
            rates |= {f"majority@{cell['samples']}": cell["majority"]} if cell["majority"] else {}
            shown = "  ".join(f"{name} {rate['value']:.3f} ({_interval(rate['ci95'])})" for name, rate in rates.items())
            lines.append(f"{_key(cell)} {shown}")
    for title, parts in (("published grader, run-on kept", "split"), ("training reward", "format")):
        for part in found[parts]:
            rest = " + ".join(f"{name} {points(part[name])}" for name in part if name not in ("shots", "total", "ci95"))
            lines.append(f"gain at {shots(part['shots'])} ({title}) {points(part['total'])} points = {rest}")
    lines += [claim(pair) for pair in main_pairs(found)]
    return "\n".join(lines + [f"warning: {sentence}" for sentence in failures(found)])


def _key(cell: dict) -> str:
    return f"{cell['model']:<6} {cell['shots']:>5}  {cell['stop']:<11}  {cell['grader']:<17}"


def _interval(ci95: list[float]) -> str:
    return f"{ci95[0]:.3f} .. {ci95[1]:.3f}"
