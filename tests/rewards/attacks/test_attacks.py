"""The battery: programs that cheat earn nothing, programs that attack get nowhere, and honest ones pass.

A tenth runs each time; all run where time allows, in boxes of several kinds of machine.
"""

import json
import re
from pathlib import Path

import pytest

from rewards.sandbox.client import Box, Child
from rewards.sandbox.judge import judge
from tests.fakes.sealing import only_here
from tests.rewards.attacks.calls import CALLS, PATH

pytestmark = only_here
SECONDS = 0.5
SECRETS = ["s3cr3t-81736", "s3cr3t-29175"]
ARGUMENTS = [[3, 1], [5]]
CALL = {"kind": "call", "entry_point": "f"}
CALL["cases"] = [{"args": [a], "result": secret} for a, secret in zip(ARGUMENTS, SECRETS, strict=True)]
ASSERTS = {"kind": "asserts", "names": ["f"], "setup": ""}
ASSERTS["code"] = f"""
def check(candidate):
    assert candidate({ARGUMENTS[0]}) == {SECRETS[0]!r}, {SECRETS[0]!r}
    assert not candidate({ARGUMENTS[1]}) != {SECRETS[1]!r}
check(f)
"""
PRINT = {"kind": "stdin", "cases": [{"input": "3\n", "output": "1 2 3\n"}]}
MACHINES = {"this": (), "plain user": ("root",), "seccomp alone": ("user", "namespaces", "landlock")}
EVERY = 10
ATTACK = PATH.decode().replace("canary", "attack")
"""A file that some attacks want to make."""


def programs(file: str) -> list[tuple[str, ...]]:
    """(name, program, and what follows it) of a file."""
    text = (Path(__file__).parent / file).read_text().replace("/tmp/grpo-canary", PATH.decode())
    text = text.replace("/tmp/grpo-attack", ATTACK)
    parts = [part.partition("\n") for part in re.split(r"^=== ", text, flags=re.M)[1:]]
    pieces = [(name, *re.split(r"^--- \w+\n", body, flags=re.M)) for name, _, body in parts]
    return [tuple(text.rstrip("\n") for text in piece) for piece in pieces]


COMPILED = [
    ("deep parentheses", "def f(x): return " + "(" * 3000 + ")" * 3000),
    ("many operators", "def f(x): return " + "-" * 10**5 + "1"),
    ("nested functions", "".join(" " * i + f"def f{i}():\n" for i in range(99)) + " " * 99 + "pass"),
    ("no text", "\x00"),
]
CALLED, PRINTED, DEEDS = programs("called.txt") + COMPILED, programs("printed.txt"), programs("deeds.txt")
SCRIPTS, FUNCTIONS = programs("honest.txt"), programs("functions.txt")
COUNTS = "import sys\nn = sum(1 for _ in sys.stdin)\nprint(n)\nprint('\\n'.join(map(str, range(n))))"
WINDOWS = 'import sys\r\nfor line in sys.stdin:\r\n    print(len(line), len("""\r\n"""))\r\n'
SCRIPTS.append(("line ends of Windows", WINDOWS, "a\r\nb\r\n", "2 1\n2 1"))
SCRIPTS.append(("many lines", COUNTS, "x\n" * 10**5, "100000\n" + "\n".join(map(str, range(10**5)))))


def selected(cases: list) -> list:
    """All cases with their names; nine of ten only where slow tests run."""
    marks = [[pytest.mark.slow] if i % EVERY else [] for i in range(len(cases))]
    return [pytest.param(*case, id=case[0], marks=mark) for case, mark in zip(cases, marks, strict=True)]


@pytest.fixture(scope="module")
def box():
    with Box() as started:
        yield started


@pytest.fixture(scope="module", params=[*MACHINES])
def boxes(request):
    with Box(without=MACHINES[request.param]) as started:
        yield started


@pytest.fixture(scope="module", autouse=True)
def canary():
    """A file that everyone may change, and its neighbour that nobody has made."""
    file, made = Path(PATH.decode()), Path(ATTACK)
    file.write_text("whole")
    file.chmod(0o666)
    yield
    assert file.read_text() == "whole" and file.stat().st_mode & 0o777 == 0o666 and not made.exists()
    file.unlink()


@pytest.fixture(autouse=True)
def the_next_program_is_unharmed(request):
    started = request.getfixturevalue("boxes" if "boxes" in request.fixturenames else "box")
    yield
    assert judge(started, "def f(a): return [a]", {**CALL, "cases": [{"args": [1], "result": [1]}]}, 2.0).correct


@pytest.mark.parametrize("tests", [CALL, ASSERTS], ids=["call", "asserts"])
@pytest.mark.parametrize(("name", "program"), selected(CALLED))
def test_a_function_that_cheats_passes_no_test(box, name, program, tests):
    verdict = judge(box, program, tests, SECONDS)
    assert (verdict.passed, verdict.correct) == (0.0, False)


@pytest.mark.parametrize(("name", "program"), selected(PRINTED))
def test_a_script_that_cheats_passes_no_test(box, name, program):
    verdict = judge(box, program, PRINT, SECONDS)
    assert (verdict.passed, verdict.correct) == (0.0, False)


def attempt(deed: str) -> str:
    """A program that says whether a deed succeeded."""
    body = deed.replace("\n", "\n    ")
    ends = "    os.write(1, b'DONE')\nexcept BaseException:\n    os.write(1, b'held')\nos._exit(0)"
    return f"import os\ntry:\n    {body}\n{ends}"


def refused(box: Box, deed: str) -> None:
    """Run a deed. It does not succeed, and whatever happens to its process, the box stays."""
    process = box.process
    (ended,) = box.run([Child("script", attempt(deed).encode(), SECONDS, 3.0, b"")])
    assert ended.told == b"compiled" and b"DONE" not in ended.printed
    assert ended.printed == b"held" or ended.status < 0
    assert box.process is process and process.poll() is None


@pytest.mark.parametrize(("name", "deed"), selected(DEEDS))
def test_a_deed_is_refused(boxes, name, deed):
    refused(boxes, deed)


@pytest.mark.parametrize(("name", "number", "arguments"), selected(CALLS))
def test_a_system_call_is_refused(boxes, name, number, arguments):
    made = ", ".join(repr(a) if isinstance(a, bytes) else f"ctypes.c_long({a})" for a in (*arguments, 0))
    refused(boxes, f"import ctypes\nassert ctypes.CDLL(None).syscall(ctypes.c_long({number}), {made}) >= 0")


@pytest.mark.parametrize(("name", "program", "read", "printed"), selected(SCRIPTS))
def test_an_honest_script_passes(boxes, name, program, read, printed):
    verdict = judge(boxes, program, {"kind": "stdin", "cases": [{"input": read, "output": printed}]}, 4.0)
    assert verdict.correct and verdict.ran, verdict


@pytest.mark.parametrize(("name", "program", "arguments", "result"), selected(FUNCTIONS))
def test_an_honest_function_passes(boxes, name, program, arguments, result):
    case = {"args": json.loads(arguments), "result": json.loads(result)}
    verdict = judge(boxes, program, {**CALL, "cases": [case]}, 4.0)
    assert verdict.correct and verdict.ran, verdict


def test_there_are_enough_of_each():
    assert len(CALLED) + len(PRINTED) >= 110 and len(DEEDS) + len(CALLS) >= 150 and len(SCRIPTS + FUNCTIONS) >= 60
    for cases in (CALLED, PRINTED, DEEDS, CALLS, SCRIPTS, FUNCTIONS):
        assert len({case[0] for case in cases}) == len(cases)


def test_the_deeds_are_deeds(monkeypatch, box):
    """Without a seal some of them succeed, so what refuses them is the sandbox."""
    monkeypatch.setenv("GRPO_UNSAFE_CODE", "1")
    done, deeds = 0, {name.partition(" | ")[0]: deed for name, deed in DEEDS}
    with Box() as box:
        for name in ("reads a file", "lists the root", "fork", "TCP", "pair of sockets", "memory file", "host name"):
            (ended,) = box.run([Child("script", attempt(deeds[name]).encode(), 2.0, 5.0, b"")])
            done += ended.printed == b"DONE"
    assert done == 7
