"""The tests of a programming problem in one of the three shapes that `code.py` describes, whatever form they come in.

Left out: the other fields of a row (`code_formats.py`), and running a program.
"""

import ast
import base64
import builtins
import io
import json
import pickle
import zlib
from collections.abc import Iterator

MOST = 16
"""Of a problem with more tests those with the longest inputs are kept, as DeepCoder does."""
MOST_BYTES = 1 << 28
"""Of packed tests, when they are unpacked."""
TESTS = ("test", "Test")
"""How the names of the tests of pytest begin."""


class Unfit(ValueError):
    """The tests of this problem cannot be run by a program of which only plain data comes out."""


def of_cases(cases: object, name: str | None, encoded: bool = False) -> tuple[dict, bool]:
    """The tests of a list of cases, and whether some were left out.

    Args:
      cases: {"args", "kwargs"?, "result"} of calls, or {"input", "output"} of standard input. In files of others an
        input may be one JSON value a line, the arguments of a call.
      name: of the function that is called, unless a case says it.
      encoded: whether a name makes inputs and outputs the arguments and the result of a call.
    """
    if not isinstance(cases, list) or not cases or not all(isinstance(case, dict) for case in cases):
        raise ValueError("the tests must be a list of objects, at least one")
    made, names = [], set()
    for case in cases:
        told = case.get("fn_name") or (case.get("metadata") or {}).get("func_name") or name
        if "args" in case and "result" in case:
            if not isinstance(case["args"], list) or not isinstance(case.get("kwargs", {}), dict):
                raise ValueError(f"'args' must be a list and 'kwargs' an object, not {case!r}")
            kept = {key: case[key] for key in ("args", "kwargs", "result") if key in case}
        elif "input" not in case or "output" not in case:
            raise ValueError(f"a test must have 'input' and 'output', or 'args' and 'result', not {sorted(case)}")
        elif encoded and told and case.get("testtype", "functional") == "functional":
            kept = _call(case["input"], case["output"])
        else:
            kept, told = {"input": joined(case["input"]), "output": joined(case["output"])}, None
        if "args" in kept and not told:
            raise ValueError("tests with 'args' need 'entry_point', the name of the function")
        names.add(told)
        made.append(kept)
    if len(names) > 1 or (name and not encoded and None in names):
        raise ValueError("the tests mix calls with standard input, or functions; all must be of one kind")
    (told,) = names
    longest = sorted(range(len(made)), key=lambda i: -len(made[i].get("input") or json.dumps(made[i])))[:MOST]
    kind = {"kind": "call", "entry_point": told} if told else {"kind": "stdin"}
    return {**kind, "cases": [made[i] for i in sorted(longest)]}, len(made) > MOST


def of_asserts(lines: object, setup: str, solution: str, name: str | None = None) -> dict:
    """Tests that are Python code; the functions that they call are `name`, or those of the solution.

    Raises:
      Unfit: an argument is a class, or an object of a class of the solution. It could not leave the program.
    """
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise ValueError("the tests must be a list of texts, at least one")
    code = "\n".join(lines)
    body = parse(solution, "the solution").body if solution and not name else []
    used = {node.id for node in ast.walk(parse(f"{setup}\n{code}", "the tests")) if isinstance(node, ast.Name)}
    if classes := [node.name for node in body if isinstance(node, ast.ClassDef) and node.name in used]:
        raise Unfit(f"its tests use {classes[0]}, a class of the program")
    names = [name] if name else sorted(set(_defined(body)) & used)
    if not names:
        raise ValueError("must have 'entry_point', or a solution that defines what its tests call")
    for node in ast.walk(parse(code, "the tests")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            for given in (given.id for given in node.args if isinstance(given, ast.Name)):
                if isinstance(getattr(builtins, given, None), type):
                    raise Unfit(f"its tests pass {given}, a type, to the program")
    return {"kind": "asserts", "code": code, "names": names, "setup": setup}


def is_pytest(code: str) -> bool:
    """Whether tests are a file of pytest, which imports what it calls from the module `solution`.

    Raises:
      Unfit: they need more of pytest than functions without arguments and `pytest.raises(Error)`.
    """
    tree = parse(code, "test")
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "solution"]
    if not imports:
        return False
    if any(alias.name == "*" or alias.asname for node in imports for alias in node.names):
        raise Unfit("its tests import from solution without a name, or under another name")
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name.startswith(TESTS):
            if not isinstance(node, ast.FunctionDef) or ast.unparse(node.args) or node not in tree.body:
                raise Unfit(f"its test {node.name} is not a plain function without arguments")
        elif isinstance(node, ast.ImportFrom) and node.module == "pytest":
            raise Unfit("its tests import from pytest")
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest" and node.attr != "raises":
            raise Unfit(f"its tests use pytest.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises" and node.keywords:
            raise Unfit(f"its tests use pytest.raises with {node.keywords[0].arg}")
    return True


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def unpack(tests: object) -> list:
    """A list of tests: as it is, as JSON text, or as base64 of zlib of a pickle of it, as in LiveCodeBench.

    A pickle can call any function when it is read. Here one is refused that asks for anything but plain data.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            tests = _unpickle(tests)
    tests = json.loads(tests) if isinstance(tests, str | bytes) else tests
    if not isinstance(tests, list):
        raise ValueError(f"the tests must be a list, not {type(tests).__name__}")
    return tests


class _PlainData(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> None:
        raise ValueError(f"the packed tests ask for {module}.{name}; only plain data is read")


def _unpickle(text: str) -> object:
    try:
        unzip = zlib.decompressobj()
        content = unzip.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
        if unzip.unconsumed_tail:
            raise ValueError(f"they have more than {MOST_BYTES:,} bytes")
        return _PlainData(io.BytesIO(content)).load()
    except Exception as error:  # pickle raises many types
        raise ValueError(f"the tests are neither JSON nor packed as LiveCodeBench does ({error})") from error


def joined(lines: object) -> str:
    """An input or output as one text; some files have a list of lines, or a list in a list."""
    if isinstance(lines, list):
        return "\n".join(map(joined, lines))
    if not isinstance(lines, str | int | float):
        raise ValueError(f"an input or output must be a text or a list of lines, not {lines!r}")
    return str(lines)


def _call(given: object, result: object) -> dict:
    """A call. Arguments are a list, or a text with one JSON value a line; then the result is JSON too."""
    if isinstance(given, str):
        return {"args": [value_of(line) for line in given.split("\n") if line.strip()], "result": value_of(result)}
    return {"args": given if isinstance(given, list) else [given], "result": result}


def value_of(text: object) -> object:
    """The value of a JSON text; what is none is a text itself."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def parse(code: str, what: str) -> ast.Module:
    """The syntax of Python code; ValueError, which begins with `what`, if it has none."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two: nested too deeply
        raise ValueError(f"{what} cannot be read as Python ({str(error) or type(error).__name__})") from error
