"""Rows of the usual files of programming problems, turned into one shape; a row's format is known by its fields.

HumanEval (https://arxiv.org/abs/2107.03374), MBPP (https://arxiv.org/abs/2108.07732), `input_output` as in APPS
(https://arxiv.org/abs/2105.09938) and TACO, LiveCodeBench (https://arxiv.org/abs/2403.07974) and lists of tests like
its own, `verification_info`, KodCode (https://arxiv.org/abs/2503.02951), and the lines that `code.py` describes. Left
out: files and splits (`code.py`), the form of the tests (`code_tests.py`), and running a program.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field

from data.code_tests import Unfit, is_pytest, of_asserts, of_cases, parse, unpack, value_of

STOP = ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint"]
"""What ends the function of HumanEval that a completion goes on with."""
WHOLE = "End with the whole program between ```python and ```."


@dataclass
class Parts:
    """What a row says."""

    prompt: str
    tests: dict
    """As `code.py` describes `info["tests"]`."""
    answer: str = ""
    """The solution as in the data; empty where there is none."""
    info: dict = field(default_factory=dict)
    """More entries of `Problem.info`."""
    cut: bool = False
    """Whether there were more than `code_tests.MOST` tests."""


def read_row(row: dict) -> tuple[str, Parts]:
    """The name of a row's format, and what the row says.

    Raises:
      Unfit: its tests cannot travel.
      ValueError: it has the fields of no format, or of two; a field is missing or has another form; it mixes tests.
    """
    found = [name for name, (tells, _) in FORMATS.items() if row.get(tells) is not None]
    if "HumanEval" in found and row.get("test") is not None:  # its tests
        found.remove("own lines with a test")
    if len(found) != 1:
        tells = ", ".join(f"{tells} ({name})" for name, (tells, _) in FORMATS.items())
        several = f"the fields of {' and '.join(found)}" if found else "no tests"
        raise ValueError(f"has {several}; exactly one of these must be there: {tells}")
    return found[0], FORMATS[found[0]][1](row)


def _human_eval(row: dict) -> Parts:
    row = {**row, "solution": _text(row, "canonical_solution"), "form": "continue"}
    _text(row, "entry_point")
    return _own_test(row)


def _mbpp(row: dict) -> Parts:
    code, asserts = _text(row, "code"), row["test_list"]
    setup = row.get("test_setup_code") or row.get("test_imports") or ""
    lines = setup if isinstance(setup, list) else [setup]
    imports = [ast.unparse(node) for node in parse(code, "code").body if isinstance(node, ast.Import | ast.ImportFrom)]
    tests = of_asserts(asserts, "\n".join([*imports, *lines]).strip(), code)
    shown = "\n".join(asserts)
    prompt = f"{_text(row, 'text', 'prompt')}\nYour code should pass these tests:\n\n{shown}\n\n{WHOLE}\n"
    return Parts(prompt, tests, code)


def _apps(row: dict) -> Parts:
    given = _object(row, "input_output")
    inputs, outputs, name = given.get("inputs"), given.get("outputs"), given.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("'input_output' must hold the lists 'inputs' and 'outputs', of one length")
    if name and outputs and all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]  # as many of these files wrap a result
    cases = [{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)]
    return _asked(row, cases, name)


def _verification_info(row: dict) -> Parts:
    given = _object(row, "verification_info")
    if given.get("language", "python") not in ("python", "python3"):
        raise Unfit(f"is to be solved in {given['language']}")
    return _asked(row, given.get("test_cases"), given.get("fn_name"))


def _live_code_bench(row: dict) -> Parts:
    packed = [row["public_test_cases"], row.get("private_test_cases") or []]
    name = (_object(row, "metadata") if row.get("metadata") else {}).get("func_name")
    return _asked(row, [case for cases in packed for case in unpack(cases)], name)


def _own_list(row: dict) -> Parts:
    cases = unpack(row["tests"])
    if not any("testtype" in case or "metadata" in case for case in cases if isinstance(case, dict)):
        tests, cut = of_cases(cases, row.get("entry_point"))
        if row.get("checker") is not None:
            if tests["kind"] != "stdin":
                raise ValueError("'checker' judges what whole programs print, so tests need 'input' and 'output'")
            if not parse(_text(row, "checker"), "checker").body:
                raise ValueError("'checker' has no statement")
            tests["checker"] = row["checker"]
        return _own(row, tests, cut)
    return _asked(row, cases, None)


def _own_test(row: dict) -> Parts:
    code, name = _text(row, "test"), row.get("entry_point")
    if is_pytest(code):
        tests = of_asserts([code], row.get("setup") or "", row.get("solution") or "", name)
        return _own(row, tests) if row.get("prompt") else _posed(row, tests)
    prompt = _text(row, "prompt")
    if any(getattr(node, "name", "") == "check" for node in parse(code, "test").body):
        code = f"{code}\ncheck({_text(row, 'entry_point')})\n"
    setup = [row.get("setup") or ""]
    if row.get("form") == "continue":  # what the prompt has beside the function that is asked for
        body = parse(prompt, "prompt").body
        setup += [ast.unparse(node) for node in body if getattr(node, "name", "") != name]
    return _own(row, of_asserts([code], "\n".join(setup).strip(), row.get("solution") or "", name))


def _own_asserts(row: dict) -> Parts:
    solution = row.get("solution") or ""
    return _own(row, of_asserts(row["asserts"], row.get("setup") or "", solution, row.get("entry_point")))


def _own(row: dict, tests: dict, cut: bool = False) -> Parts:
    """Of a row whose prompt is used as it is written."""
    prompt, form = _text(row, "prompt"), row.get("form") or "block"
    if form not in ("block", "continue"):
        raise ValueError(f"'form' must be 'block' or 'continue', not {form!r}")
    info = {"form": form, "stop": row.get("stop", STOP if form == "continue" else [])}
    if form == "continue":
        info["prefix"] = row["prefix"] if isinstance(row.get("prefix"), str) else prompt
        info["question"] = f"Complete this program. {WHOLE}\n\n```python\n{prompt.strip()}\n```"
    if isinstance(row.get("question"), str):
        info["question"] = row["question"]
    return Parts(prompt, tests, _solution(row), info, cut)


def _asked(row: dict, cases: object, name: str | None) -> Parts:
    """Of a row that poses a question without saying what to write."""
    return _posed(row, *of_cases(cases, name, encoded=True))


def _posed(row: dict, tests: dict, cut: bool = False) -> Parts:
    task = "a Python program that reads standard input and prints the answer"
    if tests["kind"] != "stdin":
        names = tests.get("names") or [tests["entry_point"]]
        task = f"a Python program that defines {' and '.join(f'`{name}`' for name in names)}"
    prompt = f"{_text(row, 'question', 'question_content', 'problem', 'problem_statement', 'prompt').strip()}\n\n"
    start = row.get("starter_code")
    if isinstance(start, str) and start.strip():
        prompt += f"Begin with this code:\n```python\n{start.rstrip()}\n```\n\n"
    return Parts(f"{prompt}Write {task}. {WHOLE}\n", tests, _solution(row), {}, cut)


def _solution(row: dict) -> str:
    given = next((row[name] for name in ("solution", "gold_standard_solution", "solutions") if row.get(name)), "")
    given = value_of(given) if isinstance(given, str) and given.startswith("[") else given
    given = (given or [""])[0] if isinstance(given, list) else given
    if not isinstance(given, str):
        raise ValueError(f"the solution must be a text, not {given!r}")
    return given


def _text(row: dict, *names: str) -> str:
    given = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(given, str):
        raise ValueError(f"{' or '.join(map(repr, names))} must be a string, not {given!r}")
    return given


def _object(row: dict, name: str) -> dict:
    given = value_of(row[name])
    if not isinstance(given, dict):
        raise ValueError(f"{name!r} must be an object or its JSON text, not {row[name]!r:.80}")
    return given


FORMATS: dict[str, tuple[str, Callable[[dict], Parts]]] = {
    "HumanEval": ("canonical_solution", _human_eval),
    "MBPP": ("test_list", _mbpp),
    "APPS": ("input_output", _apps),
    "verification_info": ("verification_info", _verification_info),
    "LiveCodeBench": ("public_test_cases", _live_code_bench),
    "own lines": ("tests", _own_list),
    "own lines with a test": ("test", _own_test),
    "own lines with asserts": ("asserts", _own_asserts),
}
"""{name: (the field that tells it, how its rows are read)}."""
