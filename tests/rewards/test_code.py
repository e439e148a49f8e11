"""Rewards of programs: what counts as a program, what it earns, and that it earns 0 and not None whatever it does."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rewards
from data.problem import Problem
from rewards import code, sandbox
from rewards.runner import RewardRunner
from tests.fakes.sealing import only_here

pytestmark = only_here
ROOT = Path(__file__).parents[2]
TESTS = {"kind": "stdin", "cases": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}]}
NAMES = ["code.extracts", "code.compiles", "code.runs", "code.passed", "code.correctness"]
ADDS = "print(sum(map(int, input().split())))"


def problem(**info) -> Problem:
    return Problem("Add.", "", {"tests": TESTS, "seconds": 1.0, **info})


def block(program: str) -> str:
    return f"Let me think.\n```python\n{program}\n```\nDone."


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (block("a\nb"), "a\nb"),
        (block("a") + "\n" + block("b"), "b"),
        ("```py\na\n```", "a"),
        ("  ```Python \n  a\n  ```", "  a"),
        ("```python\r\na\r\n```", "a\r"),
        ("```python\na", "a"),
        (block("a") + "\n```python\nb", "b"),
        (block("a") + "\n```text\nout\n```", "a"),
        ("```\nanything\n```\n" + block("a"), "a"),
        ("```text\n```python\nb\n```", ""),
        ("```python\nprint('```')\n```", "print('```')"),
        ("````python\na\n````", "a"),
        ("a = 1", ""),
        ("```text\na\n```", ""),
        ("```python\n\n```", ""),
        ("", ""),
    ],
)
def test_the_last_block_of_python_is_the_program(completion, program):
    assert code.program_of(completion, problem()) == program
    assert code.extracts(completion, problem()) == (0.1 if program else 0.0)


def test_a_completion_that_continues_its_prefix_is_the_rest_of_the_program():
    asked = problem(form="continue", prefix="def f(x):\n")
    assert code.program_of("    return x\n", asked) == "def f(x):\n    return x\n"
    assert code.program_of(" \n", asked) == ""


def test_finding_the_program_takes_time_linear_in_the_text():
    """Its square would take hours."""
    lines = ["``` " * 10**5, "```" + "a" * 10**6 + "`", "```" + " " * 10**6 + "`", "```x`"]
    text = "\n".join(["```python", *lines, "`" * 10**6, *["```"] * 10**5])
    assert code.program_of(text, problem()) == "\n".join(lines)


EARNED = {
    ADDS: [0.1, 0.1, 0.1, 1.0, 1.0],
    "print(3)": [0.1, 0.1, 0.1, 0.5, 0.0],
    "1 / 0": [0.1, 0.1, 0.0, 0.0, 0.0],
    "print(": [0.1, 0.0, 0.0, 0.0, 0.0],
    "while True: pass": [0.1, 0.1, 0.0, 0.0, 0.0],
    "import os\nos.kill(os.getpid(), 9)": [0.1, 0.1, 0.0, 0.0, 0.0],
    "while True: print('x' * 10**6)": [0.1, 0.1, 0.0, 0.0, 0.0],
    "": [0.0] * 5,
}


def test_what_programs_earn_and_that_none_of_them_is_invalid():
    """Two workers share the batch: the order stays."""
    with RewardRunner(NAMES, 0.5, workers=2) as runner:
        facts = runner.prepare()
        assert facts["sandbox"].startswith("seccomp, rlimits")
        values = runner.score([block(program) for program in EARNED], [problem()] * len(EARNED))
        assert not runner.failures and not runner.first_errors
    assert [list(earned) for earned in zip(*values, strict=True)] == list(EARNED.values())


def test_full_values_are_what_a_right_program_earns():
    assert [rewards.full_value(name) for name in NAMES] == EARNED[ADDS]
    assert [name for name in rewards._known() if name.startswith("code.")] == NAMES


def test_one_execution_serves_all_rewards(monkeypatch):
    judged = []
    monkeypatch.setattr(code, "_verdicts", type(code._verdicts)())
    monkeypatch.setattr(code, "KEPT", 2)
    monkeypatch.setattr(sandbox, "judge", lambda box, *asked: judged.append(asked) or sandbox.Verdict())
    monkeypatch.setattr(sandbox, "box", lambda: None)
    for name in NAMES:
        rewards.load(name)(block("a"), problem())
    assert judged == [("a", TESTS, 1.0)]
    code.passed(block("a"), problem(tests={"kind": "stdin", "cases": []}))
    code.passed(block("b"), problem())
    assert len(judged) == 3
    code.passed(block("a"), problem())  # two are kept
    assert len(judged) == 4


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"tests": None}, r"info\['tests'\] is None: must be a dict"),
        ({"seconds": 0}, r"info\['seconds'\] is 0: must be > 0 and <= 15"),
        ({"seconds": 99.0}, r"info\['seconds'\] is 99\.0"),
    ],
)
def test_a_problem_that_can_not_be_graded_is_named(info, message):
    with pytest.raises(ValueError, match=message):
        code.correctness(block("a"), problem(**info))


def test_a_machine_that_can_not_seal_refuses_before_the_first_batch(tmp_path):
    """The kind: no seccomp. The worker's sandbox is told that there is none, as a machine would."""
    (tmp_path / "sitecustomize.py").write_text(
        "import rewards.sandbox.client as client\n"
        "client.Box._answer = lambda self: {'layers': [], 'unsealed': 'Function not implemented'}\n"
    )
    run = "import sys\nfrom rewards.runner import RewardRunner\nRewardRunner(['code.correctness'], 1.0).prepare()"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: rewards: this machine can not seal a program (Function not implemented).")


def test_the_opt_out_is_said_at_every_start(monkeypatch, capfd):
    monkeypatch.setenv("GRPO_UNSAFE_CODE", "1")
    with RewardRunner(["code.correctness"], 5.0) as runner:
        assert runner.prepare()["sandbox"].startswith("NONE, because GRPO_UNSAFE_CODE is 1")
        assert runner.score([block(ADDS)], [problem()]) == [[1.0]]
    assert "warning: sandbox: NONE" in capfd.readouterr().err


RUN = """
from data.problem import Problem
from rewards.runner import RewardRunner
problem = Problem("", "", {"tests": {"kind": "stdin", "cases": [{"input": "", "output": ""}]}, "seconds": 15.0})
runner = RewardRunner(["code.correctness"], 5.0)
runner.prepare()
print(runner._workers[0].process.pid, flush=True)
runner.score(["```python\\nimport time\\ntime.sleep(600)\\n```"], [problem])
"""


def test_worker_box_and_program_end_with_a_run_that_is_killed():
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, cwd=ROOT)
    worker = int(run.stdout.readline())
    family: list[int] = []
    end = time.monotonic() + 60
    while len(family) < 3 and time.monotonic() < end:
        time.sleep(0.05)
        family = below(worker)
    run.kill()
    run.wait()
    while any(map(alive, [worker, *family])) and time.monotonic() < end:
        time.sleep(0.02)
    assert len(family) >= 2 and not any(map(alive, [worker, *family]))


def below(pid: int) -> list[int]:
    """All processes that a process and its children have started."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        children = []
    return children + [other for child in children for other in below(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_tests_and_completions_of_any_text_pass_through():
    odd = "\ud800\x00\u2028"
    tests = {"kind": "stdin", "cases": [{"input": odd, "output": json.dumps(len(odd))}]}
    program = "import sys\nprint(len(sys.stdin.buffer.read().decode('utf-8', 'surrogatepass')))"
    assert code.correctness(block(program), problem(tests=tests)) == 1.0
    assert code.compiles(block(f"x = {odd!r}\n" + random.Random(0).randbytes(99).decode("latin-1")), problem()) == 0.0
