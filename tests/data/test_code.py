"""Programming problems: each format of a file, the splits, what is refused, and that the solutions pass their tests."""

import base64
import gzip
import json
import os
import pickle
import zlib
from pathlib import Path

import pytest

import data
from data import check
from data.code import problems_of
from data.code_formats import STOP, WHOLE
from data.code_tests import MOST
from tests.fakes.sealing import only_here

HUMAN_EVAL = Path(os.environ.get("GRPO_TEST_DATA", "nowhere"), "humaneval", "HumanEval.jsonl.gz")
HALF = {
    "task_id": "HumanEval/x",
    "prompt": 'import math\n\ndef double(x):\n    return 2 * x\n\ndef half(x):\n    """Half of x."""\n',
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(double(3)) == 3\n",
}
MBPP = {
    "text": "Write a function to add.",
    "task_id": 7,
    "code": "import sys\r\ndef helper(a):\r\n  return a\r\ndef add(a, b):\r\n  return helper(a) + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(sys.maxsize, sum([0])) == sys.maxsize"],
    "test_setup_code": "",
}
ADD = "def add(a, b):\n    return a + b\n"
SUM = "print(sum(map(int, input().split())))\n"


def write(file, *rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def read(tmp_path):
    """Gives the only problem of a file with one row."""

    def one(row):
        (problem,) = problems_of(write(tmp_path / "one.jsonl", row))
        return problem

    return one


def plain(completions, problems) -> list[float]:
    """Stands in for `code.correctness`: runs a program and its tests here. For trusted programs only."""
    return [float(passes(*pair)) for pair in zip(completions, problems, strict=True)]


def passes(completion, problem) -> bool:
    info, tests = problem.info, problem.info["tests"]
    program = completion.rpartition("```python\n")[2].partition("```")[0]
    if info["form"] == "continue":
        program = info["prefix"] + completion
    namespace = {"__name__": "solution"}
    if tests["kind"] == "stdin":
        written = []
        for case in tests["cases"]:
            lines = iter(case["input"].split("\n"))
            given = {
                "input": lambda lines=lines: next(lines),
                "print": lambda *a: written.append(" ".join(map(str, a))),
            }
            exec(program, dict(namespace) | given)
        return written == [case["output"].strip() for case in tests["cases"]]
    exec(program, namespace)
    if tests["kind"] == "call":
        function = namespace[tests["entry_point"]]
        return all(function(*case["args"], **case.get("kwargs", {})) == case["result"] for case in tests["cases"])
    checker = {}
    exec(tests["setup"], checker)
    assert not set(tests["names"]) & checker.keys()
    checker |= {name: namespace[name] for name in tests["names"]}
    try:
        exec(tests["code"], checker)
    except Exception:  # a wrong program may also break its tests
        return False
    return True


def test_lines_of_a_whole_program(read):
    row = {
        "prompt": "Add.\n",
        "tests": [{"input": "1 2\n", "output": "3\n"}],
        "solution": SUM,
        "seconds": 2,
        "id": "s1",
    }
    problem = read(row)
    assert (problem.prompt, problem.answer) == ("Add.\n", SUM)
    assert problem.info == {
        **{"question": "Add.\n", "shots": [], "stop": [], "stop_plain": ["\n```\n"], "form": "block"},
        **{"name": "s1", "format": "own lines"},
        **{"seconds": 2, "tests": {"kind": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}]}},
    }


def test_lines_of_a_function(read):
    cases = [{"args": [1], "kwargs": {"b": 2}, "result": 3}, {"args": ["a", "b"], "result": "ab", "note": "strings"}]
    problem = read({"prompt": "Add.", "entry_point": "add", "tests": cases, "solution": ADD, "stop": ["END"]})
    del cases[1]["note"]
    assert problem.info["tests"] == {"kind": "call", "entry_point": "add", "cases": cases}
    assert (problem.info["stop"], problem.info["name"]) == (["END"], "line 1") and "stop_plain" not in problem.info
    assert check.failing([problem], plain) == []


@pytest.mark.parametrize("named", [{"entry_point": "add"}, {"solution": ADD}])
def test_lines_with_asserts(read, named):
    problem = read(
        {"prompt": "Add.", "asserts": ["assert add(1, n) == 3", "assert add(0, 0) == 0"], "setup": "n = 2"} | named
    )
    code = "assert add(1, n) == 3\nassert add(0, 0) == 0"
    assert problem.info["tests"] == {"kind": "asserts", "code": code, "names": ["add"], "setup": "n = 2"}


def test_a_line_may_go_on_with_its_prompt(read):
    row = {name: value for name, value in HALF.items() if name != "canonical_solution"}
    problem = read(row | {"form": "continue", "solution": HALF["canonical_solution"], "setup": "n = 2"})
    assert problem.info["format"] == "own lines with a test"
    assert problem.info["tests"]["setup"].startswith("n = 2\nimport math\n")
    assert (problem.info["prefix"], problem.info["stop"]) == (HALF["prompt"], STOP) and "stop_plain" not in problem.info
    assert check.failing([problem], plain) == []


def test_human_eval(read):
    problem = read(HALF)
    info = problem.info
    assert (problem.prompt, problem.answer) == (HALF["prompt"], HALF["canonical_solution"])
    assert (info["prefix"], info["stop"], info["form"], info["name"]) == (
        HALF["prompt"],
        STOP,
        "continue",
        "HumanEval/x",
    )
    assert info["tests"]["names"] == ["half"] and info["tests"]["code"].endswith("\ncheck(half)\n")
    assert "def double" in info["tests"]["setup"] and "def half" not in info["tests"]["setup"]
    assert WHOLE in info["question"] and HALF["prompt"].strip() in info["question"]
    assert check.failing([problem], plain) == []
    assert check.failing([read(HALF | {"canonical_solution": "    return x\n"})], plain)


def test_human_eval_is_for_testing_only(tmp_path):
    path = write(tmp_path / "HumanEval.jsonl", *[HALF | {"prompt": f"# {i}\n{HALF['prompt']}"} for i in range(3)])
    assert len(data.load("code", "test", path=path)) == 3
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="HumanEval, which is for testing only: .* rename 'canonical_solution'"):
            data.load("code", split, path=path)
    write(tmp_path / "train.jsonl", *[MBPP | {"text": f"{i}"} for i in range(20)])
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [len(data.load("code", split, path=tmp_path)) for split in data.SPLITS] == [18, 2, 3]


def test_mbpp(read):
    """The checker has the imports of the solution; its names are those that the solution defines and tests use."""
    problem = read(MBPP)
    asserts = "\n".join(MBPP["test_list"])
    assert problem.prompt == f"{MBPP['text']}\nYour code should pass these tests:\n\n{asserts}\n\n{WHOLE}\n"
    assert problem.info["tests"] == {"kind": "asserts", "code": asserts, "names": ["add"], "setup": "import sys"}
    assert check.failing([problem], plain) == []
    sanitized = MBPP | {"prompt": MBPP["text"], "text": None, "test_setup_code": None, "test_imports": ["import math"]}
    assert read(sanitized).prompt == problem.prompt
    assert read(sanitized).info["tests"]["setup"] == "import sys\nimport math"


PAIR = {"code": "class Pair:\n  pass\ndef chain(pairs):\n  return 3", "test_list": ["assert chain([Pair()]) == 3"]}
NODE = {"code": "class Node:\n  pass\ndef depth(n):\n  return 1", "test_list": ["assert depth(root) == 1"]}
TYPE = {"code": "def without(xs, kind):\n  return []", "test_list": ["assert without((1, 2), int) == []"]}


def test_problems_whose_tests_pass_what_cannot_travel_are_left_out_by_name(tmp_path, capsys):
    """Of MBPP these are 367, 601 and 927 (objects of the program's classes) and 533 (a type)."""
    rows = (
        PAIR | {"task_id": 601},
        NODE | {"task_id": 367, "test_setup_code": "root = Node()"},
        TYPE | {"task_id": 533},
    )
    file = write(tmp_path / "left_out.jsonl", *[MBPP | row for row in rows], MBPP)
    for _ in range(2):
        assert [problem.info["name"] for problem in problems_of(file)] == ["7"]
    (said,) = capsys.readouterr().err.splitlines()  # once
    assert "3 of 4 problems are left out: 601 its tests use Pair, a class of the program" in said
    assert "367 its tests use Node" in said and "533 its tests pass int, a type, to the program" in said


ANY_DIVISOR = (
    "import sys\nn, d = (int(open(name).read()) for name in sys.argv[1:4:2])\nprint(int(1 < d and n % d == 0))"
)
KODCODE = {
    "question": "Write a function that halves even numbers.",
    "solution": "def half(x):\n    if x % 2:\n        raise ValueError\n    return x // 2\n",
    "test": "import pytest\nfrom solution import half\n\ndef test_even():\n    assert half(4) == 2\n\n"
    "def test_odd():\n    try:\n        half(3)\n    except ValueError:\n        pass\n"
    "    with pytest.raises(ValueError):\n        half(3)\n    assert half(0) == 0\n",
    "test_info": [{"function_name": "half"}],
}


def test_lines_with_a_program_that_judges_outputs(read):
    row = {"prompt": "A divisor.", "tests": [{"input": "12", "output": "2"}], "checker": ANY_DIVISOR}
    assert read(row).info["tests"] == {"kind": "stdin", "cases": row["tests"], "checker": ANY_DIVISOR}


def test_a_file_of_pytest_as_in_kodcode(read):
    problem = read(KODCODE)
    assert problem.info["tests"] == {"kind": "asserts", "code": KODCODE["test"], "names": ["half"], "setup": ""}
    assert problem.prompt == f"{KODCODE['question']}\n\nWrite a Python program that defines `half`. {WHOLE}\n"
    assert problem.answer == KODCODE["solution"] and read(KODCODE | {"prompt": "Halve."}).prompt == "Halve."


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("def test_x(tmp_path): assert half(2)", "its test test_x is not a plain function without arguments"),
        ("class TestHalf:\n  def test_x(self): assert half(2)", "its test TestHalf is not a plain function"),
        ("import pytest\ndef test_x(): assert half(2) == pytest.approx(1)", "its tests use pytest.approx"),
        ("from pytest import approx\ndef test_x(): assert half(2) == approx(1)", "its tests import from pytest"),
        ("import pytest\ndef test_x():\n  with pytest.raises(E, match='x'): half(2)", "use pytest.raises with match"),
        ("from solution import *\ndef test_x(): assert half(2)", "its tests import from solution without a name"),
    ],
)
def test_what_needs_more_of_pytest_is_left_out_by_name(tmp_path, capsys, test, said):
    file = write(tmp_path / "left_out.jsonl", KODCODE | {"test": f"from solution import half\n{test}"}, KODCODE)
    assert len(problems_of(file)) == 1 and said in capsys.readouterr().err


def test_apps_of_standard_input(read):
    tests = {"inputs": ["1 2\n", ["3 4", "5"]], "outputs": ["3\n", [["7"]]]}
    problem = read({"question": "Add.\n", "input_output": json.dumps(tests), "solutions": json.dumps([SUM, "x"])})
    cases = [{"input": "1 2\n", "output": "3\n"}, {"input": "3 4\n5", "output": "7"}]
    assert problem.info["tests"] == {"kind": "stdin", "cases": cases}
    assert problem.prompt.startswith("Add.\n\nWrite a Python program that reads standard input")
    assert problem.answer == SUM and check.failing([problem], plain) == []
    assert check.failing([read({"question": "", "input_output": tests, "solutions": ["print(3)\n"]})], plain)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([[1, 2], ["1", "2"]], [3, "12"]),
        ([[1, 2], ["1", "2"]], [[3], ["12"]]),  # wrapped
        (["1\n2", '"1"\n"2"\n'], ["3", '"12"']),  # one JSON value a line
    ],
)
def test_apps_of_a_function(read, inputs, outputs):
    tests = {"inputs": inputs, "outputs": outputs, "fn_name": "add"}
    problem = read({"question": "Add.", "starter_code": "def add(a, b):", "input_output": tests, "solutions": [ADD]})
    cases = [{"args": [1, 2], "result": 3}, {"args": ["1", "2"], "result": "12"}]
    assert problem.info["tests"] == {"kind": "call", "entry_point": "add", "cases": cases}
    assert (
        "Begin with this code:\n```python\ndef add(a, b):\n```" in problem.prompt and "defines `add`" in problem.prompt
    )
    assert check.failing([problem], plain) == []


def packed(tests) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def test_live_code_bench(read):
    public = json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}])
    private = packed([{"input": '"a"\n"b"', "output": '"ab"', "testtype": "functional"}])
    row = {"question_content": "Add.", "question_id": "q1", "metadata": json.dumps({"func_name": "add"})}
    problem = read(row | {"public_test_cases": public, "private_test_cases": private})
    cases = [{"args": [1, 2], "result": 3}, {"args": ["a", "b"], "result": "ab"}]
    assert problem.info["tests"] == {"kind": "call", "entry_point": "add", "cases": cases}
    assert (problem.answer, problem.info["name"]) == ("", "q1")
    stdin = [{"input": "1 2", "output": "3", "testtype": "stdin"}]
    problem = read(
        row | {"metadata": "{}", "public_test_cases": json.dumps(stdin), "private_test_cases": packed(stdin)}
    )
    assert problem.info["tests"] == {"kind": "stdin", "cases": [{"input": "1 2", "output": "3"}] * 2}


def test_lists_of_tests_as_of_deepcoder(read):
    tests = [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}]
    problem = read({"problem": "Add.", "tests": json.dumps(tests), "solutions": [f"```python\n{ADD}```"]})
    assert problem.info["tests"] == {"kind": "call", "entry_point": "add", "cases": [{"args": [1, 2], "result": 3}]}
    assert check.failing([problem], plain) == []
    tests = [{"input": "1 2", "output": "3", "testtype": "stdin_stdout", "metadata": {"func_name": None}}]
    assert read({"problem": "Add.", "tests": tests}).info["tests"]["kind"] == "stdin"


def test_verification_info(read):
    cases = [{"fn_name": None, "input": "1 2\n", "output": "3\n", "type": "stdin_stdout"}]
    info = json.dumps({"language": "python", "test_cases": cases})
    problem = read({"prompt": "Add.", "verification_info": info, "gold_standard_solution": f"```python\n{SUM}```"})
    assert problem.info["tests"] == {"kind": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}]}
    assert check.failing([problem], plain) == []


class Calls:
    """An object whose pickle calls a function when it is read."""

    def __reduce__(self):
        return os.mkdir, ("called",)


def test_a_pickle_that_asks_for_more_than_data_is_refused(read):
    evil = base64.b64encode(zlib.compress(pickle.dumps([Calls()]))).decode()
    with pytest.raises(
        ValueError, match=r"line 1: the tests are neither .*ask for posix.mkdir; only plain data is read"
    ):
        read({"question_content": "", "public_test_cases": evil})
    assert not Path("called").exists()


def test_packed_tests_have_a_largest_size(read, monkeypatch):
    monkeypatch.setattr("data.code_tests.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read({"question_content": "", "public_test_cases": packed(["1" * 2000])})


def test_of_many_tests_those_with_the_longest_inputs_are_kept(tmp_path, capsys):
    lengths = [*range(1, 11), 50, *range(40, 20, -1)]
    row = {"prompt": "", "tests": [{"input": "1" * n, "output": str(n)} for n in lengths]}
    (problem,) = problems_of(write(tmp_path / "many.jsonl", row))
    assert [case["output"] for case in problem.info["tests"]["cases"]] == ["50", *map(str, range(40, 25, -1))]
    assert MOST == 16 == len(problem.info["tests"]["cases"])
    assert "of 1 of 1 problems the 16 tests with the longest inputs are kept" in capsys.readouterr().err


CASE = {"input": "1", "output": "2"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "p", "answer": "a"}, "has no tests; exactly one of these must be there: canonical_solution"),
        (HALF | {"test_list": ["assert f()"]}, "has the fields of HumanEval and MBPP; exactly one"),
        (
            {"prompt": "p", "tests": [CASE], "asserts": ["assert f()"]},
            "has the fields of own lines and own lines with asserts",
        ),
        ({"prompt": "p", "tests": []}, "the tests must be a list of objects, at least one"),
        (
            {"prompt": "p", "tests": [{"input": "1"}]},
            "a test must have 'input' and 'output', or 'args' and 'result', not",
        ),
        ({"prompt": "p", "tests": [CASE, {"args": [], "result": 1}]}, "tests with 'args' need 'entry_point'"),
        ({"prompt": "p", "entry_point": "f", "tests": [CASE, {"args": [], "result": 1}]}, "the tests mix calls with"),
        ({"prompt": "p", "entry_point": "f", "tests": [CASE]}, "the tests mix calls with"),
        ({"prompt": "p", "tests": [{"args": 1, "result": 1}], "entry_point": "f"}, "'args' must be a list"),
        ({"prompt": "p", "tests": [CASE], "form": "open"}, "'form' must be 'block' or 'continue', not 'open'"),
        ({"prompt": "p", "tests": [CASE], "stop": ["", "x"]}, "'stop' must be a list of strings, none empty"),
        ({"prompt": "p", "tests": [CASE], "seconds": 0}, "'seconds' must be a number > 0 and <= 15, not 0"),
        ({"prompt": "p", "tests": [CASE], "seconds": 16}, "'seconds' must be a number > 0 and <= 15, not 16"),
        ({"prompt": "p", "tests": [CASE], "checker": "print("}, "checker cannot be read as Python"),
        ({"prompt": "p", "tests": [CASE], "checker": "# later"}, "'checker' has no statement"),
        ({"prompt": "p", "tests": [CASE], "checker": "-" * 100_000 + "1"}, "checker cannot be read as Python"),
        (
            {"prompt": "p", "tests": [{"args": [], "result": 1}], "entry_point": "f", "checker": "print(1)"},
            "'checker' judges what whole programs print",
        ),
        ({"tests": [CASE]}, "'prompt' must be a string, not None; its fields are 'tests'"),
        ({"prompt": "p", "asserts": ["assert f() ="], "entry_point": "f"}, "the tests cannot be read as Python"),
        ({"prompt": "p", "asserts": ["assert f()"]}, "must have 'entry_point', or a solution that defines what"),
        ({"question": "q", "input_output": "{}"}, "'input_output' must hold the lists 'inputs' and 'outputs'"),
        ({"question": "q", "input_output": "no"}, "'input_output' must be an object or its JSON text, not 'no'"),
        ({"question": "q", "public_test_cases": "no"}, "the tests are neither JSON nor packed as LiveCodeBench does"),
    ],
)
def test_what_a_row_lacks_is_one_sentence_with_its_place(tmp_path, row, sentence):
    file = write(tmp_path / "bad.jsonl", {"prompt": "p", "tests": [CASE]}, row)
    with pytest.raises(ValueError) as error:
        problems_of(file)
    assert str(error.value).startswith(f"{file}, line 2: {sentence}")
    assert "\n" not in str(error.value)


def test_the_options_of_the_data(tmp_path):
    with pytest.raises(ValueError, match="data_path: data 'code' needs a file"):
        data.load("code", "test")
    with pytest.raises(ValueError, match="num_shots: 1 is not 0"):
        data.load("code", "test", path=tmp_path, num_shots=1)


def test_the_check_names_solutions_that_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "_run", plain)
    monkeypatch.setattr(check, "_why", lambda problem: "(wrong)")
    row = {"prompt": "Add.", "tests": [{"input": "1 2", "output": "3"}]}
    file = write(tmp_path / "mine.jsonl", row | {"solution": SUM}, row)
    assert check.main([str(file)]) == 0
    assert capsys.readouterr().out == "2 problems; of 1 solutions 0 fail, and 1 have none\n"
    write(file, row | {"solution": SUM}, row | {"solution": "print(4)\n", "id": "wrong"})
    assert check.main([str(file)]) == 1
    assert "wrong: its own solution fails (wrong)\n" in capsys.readouterr().out
    assert check.main([str(tmp_path / "nothing.jsonl")]) == 2
    assert "data.check: error: data_path: " in capsys.readouterr().err


LONG = "x" * 90
FAILING = [
    ({"tests": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "5"}]}, SUM,
     "(wrong): test 2, input '2 2': got '4', expected '5'"),
    ({"tests": [{"input": LONG, "output": f"{LONG}b"}]}, "print(input() + 'a')",
     f"(wrong): test 1, input '{'x' * 56}...: got ...{'x' * 20}a', expected ...{'x' * 20}b'"),
    ({"tests": [{"input": "a b", "output": "3"}]}, SUM, "(raised): test 1, input 'a b'"),
    ({"tests": [{"input": "1 2", "output": "3"}], "checker": "raise SystemExit"}, SUM,
     "(wrong): test 1, input '1 2': the checker did not print 1 for '3'"),
    ({"entry_point": "add", "tests": [{"args": [1, 2], "result": 3}, {"args": [2], "kwargs": {"b": 2}, "result": 5}]},
     ADD, "(wrong): test 2, add(2, b=2): got 4, expected 5"),
    ({"entry_point": "add", "tests": [{"args": ["a", 2], "result": 5}]}, ADD,
     """(wrong): test 1, add('a', 2): raised TypeError('can only concatenate str (not "int") to str')"""),
    ({"entry_point": "add", "tests": [{"args": [[1]], "result": [2]}]}, "def add(a):\n    a.append(2)\n",
     "(wrong): test 1, add([1]): got None, expected [2]"),
    ({"entry_point": "add", "tests": [{"args": [1], "result": 1}]}, "import os\ndef add(a):\n    os._exit(0)\n",
     "(wrong): test 1, add(1): no answer"),
    ({"asserts": ["assert add(1, 2) == 3", "assert add(2, 2) == 5"]}, ADD,
     "(wrong): test 2, assert add(2, 2) == 5: got 4"),
    ({"asserts": ["for n in range(9):\n    assert add(n, n) < 6"]}, ADD,
     "(wrong): test 1, assert add(n, n) < 6: got 6"),
    ({"asserts": ["assert add(1, 2) == 3", "limit = missing", "assert add(2, 2) == limit"]}, ADD,
     """(wrong): limit = missing: the test raised NameError("name 'missing' is not defined")"""),
    ({"asserts": ["assert add is None"]}, ADD, "(wrong): test 1, assert add is None: the test raised AssertionError()"),
    ({"test": "from solution import add\ndef test_two():\n    assert add(1, 1) == 2\n    assert add(2, 2) == 5\n"}, ADD,
     "(wrong): test 1, assert add(2, 2) == 5: got 4"),
]  # fmt: skip


@only_here
@pytest.mark.parametrize(("row", "solution", "why"), FAILING)
def test_the_check_names_the_first_test_that_fails(tmp_path, capsys, row, solution, why):
    file = write(tmp_path / "mine.jsonl", row | {"prompt": "Add.", "solution": solution, "id": "mine"})
    assert check.main([str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"mine: its own solution fails {why}"


@pytest.mark.skipif(not HUMAN_EVAL.exists(), reason="GRPO_TEST_DATA has no humaneval/HumanEval.jsonl.gz")
def test_every_solution_of_human_eval_passes_its_tests():
    problems = data.load("code", "test", path=HUMAN_EVAL)
    assert len(problems) == 164 and problems_of(HUMAN_EVAL) == problems
    assert check.failing(problems, plain) == []
    empty = [problem.info["name"] for problem in problems if passes("    return None\n", problem)]
    assert not empty
