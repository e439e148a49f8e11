"""HumanEval in the sandbox: every canonical solution passes, and changed ones get the verdict of a plain harness."""

import ast
import copy
import gzip
import json
import os
import random
import resource
import signal
from pathlib import Path

import pytest

from data.problem import Problem
from rewards import code
from tests.fakes.sealing import only_here

pytestmark = [
    only_here,
    pytest.mark.skipif("GRPO_TEST_DATA" not in os.environ, reason="GRPO_TEST_DATA names no folder of real data"),
]
SECONDS = 4.0


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    file = Path(os.environ["GRPO_TEST_DATA"]) / "humaneval" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


def problem_of(row: dict) -> Problem:
    test = {"kind": "asserts", "names": [row["entry_point"]], "setup": row["prompt"]}
    test["code"] = f"{row['test']}\ncheck({row['entry_point']})"
    return Problem(
        row["prompt"], row["canonical_solution"], {"tests": test, "form": "continue", "prefix": row["prompt"]}
    )


def mutants(source: str, name: str) -> list[str]:
    """Programs with one change each in a function: an operator, a comparison, a constant, a result or a condition.

    What stands beside the function is left: where a test calls it too, the checker has its own.
    """
    swaps = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mod}
    swaps |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
    made = []

    def change(node: ast.AST) -> bool:
        if isinstance(node, ast.BinOp) and type(node.op) in swaps:
            node.op = swaps[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
            node.ops[0] = swaps[type(node.ops[0])]()
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
        elif isinstance(node, ast.Return) and node.value is not None:
            node.value = ast.Constant(None)
        elif isinstance(node, ast.If):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        else:
            return False
        return True

    def nodes(tree: ast.Module) -> list[ast.AST]:
        return [node for top in tree.body if getattr(top, "name", "") == name for node in ast.walk(top)]

    tree = ast.parse(source)
    for i in range(len(nodes(tree))):
        changed = copy.deepcopy(tree)
        if change(nodes(changed)[i]):
            made.append(ast.unparse(ast.fix_missing_locations(changed)))
    return made


def mutants_of(row: dict) -> list[str]:
    return mutants(row["prompt"] + row["canonical_solution"], row["entry_point"])


def plainly(row: dict, program: str) -> bool:
    """The verdict of program and tests in one process, as published harnesses have it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in (1, 2):
                os.dup2(nothing, fd)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS)))
            exec(f"{program}\n{row['test']}\ncheck({row['entry_point']})", {"__name__": "plain"})
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def test_every_canonical_solution_passes(rows):
    wrong = [row["task_id"] for row in rows if code.correctness(row["canonical_solution"], problem_of(row)) != 1.0]
    assert len(rows) == 164 and wrong == []


def test_an_empty_body_passes_nothing(rows):
    for row in rows[:20]:
        assert code.correctness("    pass\n", problem_of(row)) == 0.0


@pytest.mark.slow
def test_changed_solutions_get_the_verdict_of_a_plain_harness(rows):
    cases = [(row, mutant) for row in rows for mutant in mutants_of(row)]
    cases = random.Random(0).sample(cases, 900)
    apart, survived = [], 0
    for row, mutant in cases:
        problem = problem_of(row)
        problem.info["prefix"] = ""
        ours, plain = code.correctness(mutant, problem) == 1.0, plainly(row, mutant)
        survived += plain
        if ours != plain:
            apart.append((row["task_id"], ours, plain, mutant))
    assert not apart and 20 < survived < 300, (apart, survived)
