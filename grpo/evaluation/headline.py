"""Put an `eval.json` into words: the table, what can be claimed, where a gain comes from, and what failed.

The terminal and the report page both use these texts. Left out: grading and intervals (`grading.py`). Every number here
comes from the file.
"""

from pathlib import Path

from grpo.evaluation.graders import ALSO_CALLED, GRADERS
from grpo.evaluation.grading import key_of
from grpo.files import read_object


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
    measured = f"{points(pair['difference'])} points, 95 % interval {points(low)} to {points(high)}"
    if p is not None:
        measured += ", p < 0.001" if p < 0.001 else f", p = {p:.2g}"
    if low <= 0 <= high:
        why = f"at this sample size it would have to be larger than about {50 * (high - low):.1f} points"
    elif p is not None and p >= 0.05:
        why = "too few answers differ to rule out chance"
    else:
        return f"The tuned model is {'better' if low > 0 else 'worse'} ({where(pair)}): {measured}."
    return f"No difference can be claimed ({where(pair)}): measured {measured}; {why}."


def main_grader(found: dict, own: str | None = None) -> str:
    """The grader whose verdict counts in an `eval.json`.

    It is `own`, what decides in the run that the file belongs to (`eval_correct`), where the file has it. Else it is
    the first grader that was asked for. If that one is no reward function and the lenient grader was asked for too, it
    is that one, which neither format nor running on changes.
    """
    asked = [entry["grader"] for entry in found.get("cells") or found["paired"]]
    for name in (own, ALSO_CALLED.get(own)):
        if name in asked:
            return name
    lenient = lenient_grader(found)
    return lenient if lenient in asked and asked[0] in GRADERS else asked[0]


def lenient_grader(found: dict) -> str | None:
    """The grader behind the lenient accuracies of an `eval.json`; older files do not name it."""
    return found.get("lenient", "last_number")


def main_pairs(found: dict, own: str | None = None) -> list[dict]:
    """The pair that counts at each number of shots: by `main_grader` on the cut text, or as near as the file has it."""
    if not found["paired"]:
        return []
    main, best = main_grader(found, own), {}
    for pair in sorted(found["paired"], key=lambda p: (p["stop"] == "stop_string", p["grader"] == main)):
        best[pair["shots"]] = pair  # the last is the nearest
    return [best[number] for number in sorted(best)]


def main_pair(found: dict, config: dict) -> dict | None:
    """The pair that counts for the run to which an `eval.json` belongs; None if there is none."""
    return entry_of_run(main_pairs(found, config.get("eval_correct")), config)


def entry_of_run(entries: list[dict], config: dict) -> dict | None:
    """The entry for the run's own `num_shots`, else the first; None if there is none."""
    own = [entry for entry in entries if entry["shots"] == config.get("num_shots")]
    return next(iter(own + entries), None)


def accuracies(found: dict, pair: dict) -> tuple[float, float]:
    """(accuracy of base, accuracy of tuned), with the shots, stop policy and grader of the pair."""
    graded = {key_of(cell): cell["accuracy"] for cell in readings(found)}
    base, tuned = (graded[key_of({"model": model, **pair})] for model in ("base", "tuned"))
    return base, tuned


def readings(found: dict) -> list[dict]:
    """The cells; where the lenient grader is none of theirs, with a cell for each lenient accuracy, which it gave."""
    name = lenient_grader(found)
    asked = any(cell["grader"] == name for cell in found["cells"])
    of_the_grader = ("correct", "failures", "partial", "pass_at", "majority")
    shown = {}
    for cell in found["cells"]:
        shown[key_of(cell)] = cell
        if not asked and cell["lenient_accuracy"] is not None:
            lenient = {name: value for name, value in cell.items() if name not in of_the_grader}
            lenient |= {"accuracy": cell["lenient_accuracy"], "ci95": cell["lenient_ci95"], "grader": name}
            shown.setdefault(key_of(lenient), lenient)
    return list(shown.values())


def failures(found: dict) -> list[str]:
    """A sentence for each reward function that failed on texts, or paid for a part of the answer, in some cell."""
    said = []
    for cell in found["cells"]:
        texts = cell["n"] * cell.get("samples", 1)
        here = f"{cell['model']}, {shots(cell['shots'])}, {cell['stop']}"
        for name, failed in cell.get("failures", {}).items():
            said.append(
                f"{name} failed on {failed['texts']} of {texts} texts ({here}), which count as wrong; the first: "
                f"{failed['first']}"
            )
        for name, part in cell.get("partial", {}).items():
            said.append(
                f"{name} gave {part['texts']} of {texts} texts ({here}) a part of its credit, at most "
                f"{part['highest']:g}; they do not count, because {part['needed']:g} is needed"
            )
    return list(dict.fromkeys(said))  # each once, however many graders saw it


def read_result(file: Path) -> dict:
    """The content of an `eval.json`.

    Raises:
        ValueError: it was written by another version, or is damaged; names the file and the field.
    """
    found = read_object(file.read_bytes(), file, dict.fromkeys(("cells", "paired", "split", "format"), list))
    try:  # whether it can be shown
        table(found)
        for pair in main_pairs(found):
            accuracies(found, pair)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"{file} does not hold what this version writes ({type(error).__name__}: {error})"
        raise ValueError(f"{what}; delete it, to evaluate again") from error
    return found


def table_of(file: Path) -> str:
    """The table of an `eval.json`; ValueError as in `read_result`."""
    return table(read_result(file))


def table(found: dict) -> str:
    """The cells as lines of plain text, then where the gain comes from, what can be claimed, and what failed."""
    names = ("model  shots", "stop       ", "grader              n", "accuracy  95 %           ")
    lines = ["  ".join((*names, "lenient  format  finished  tokens"))]
    for cell in found["cells"]:
        lenient, form = (
            "-" if cell[name] is None else f"{cell[name]:.3f}" for name in ("lenient_accuracy", "format_rate")
        )
        lines.append(
            f"{_key(cell)} {cell['n']:>4}  {cell['accuracy']:>8.3f}  {_interval(cell['ci95']):<15}  "
            f"{lenient:>7}  {form:>6}  {cell['finished']:>8.3f}  "
            f"{cell['mean_tokens']:>6.1f}"
        )
    for cell in found["cells"]:
        rates = {f"pass@{size}": rate for size, rate in cell.get("pass_at", {}).items()}
        if cell.get("majority"):
            rates[f"majority@{cell['samples']}"] = cell["majority"]
        shown = [f"{name} {rate['value']:.3f} ({_interval(rate['ci95'])})" for name, rate in rates.items()]
        if shown:
            lines.append(f"{_key(cell)} {'  '.join(shown)}")
    for title, kind in (("published grader, run-on kept", "split"), ("training reward", "format")):
        for entry in found[kind]:
            parts = [name for name in entry if name not in ("shots", "total", "ci95")]
            rest = " + ".join(f"{name} {points(entry[name])}" for name in parts)
            lines.append(f"gain at {shots(entry['shots'])} ({title}) {points(entry['total'])} points = {rest}")
    lines += [claim(pair) for pair in main_pairs(found)]
    lines += [f"warning: {sentence}" for sentence in failures(found)]
    return "\n".join(lines)


def _key(cell: dict) -> str:
    return f"{cell['model']:<6} {cell['shots']:>5}  {cell['stop']:<11}  {cell['grader']:<17}"


def _interval(ci95: list[float]) -> str:
    return f"{ci95[0]:.3f} .. {ci95[1]:.3f}"
