"""Mutation testing of the algorithm: break one thing in a formula, and some test must fail.

    python -m tests.mutate                    all files, about ten minutes on one core
    python -m tests.mutate losses kl          some of them
    python -m tests.mutate losses --every 20  every twentieth mutant

The tests of a file are collected once. Each mutant is a fork of that process, in which the code of one function is
swapped in place; the tests run there until the first failure, those that call the function first. A mutant that no test
notices is either listed with a reason in `equivalent_mutants.txt` or a hole in the tests: then the command ends with 1.
Left out: mutants of several changes, of text, of what is raised, and of the tables at the end of a file.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import inspect
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, settings

ROOT = Path(__file__).parents[1]
REASONS = Path(__file__).with_name("equivalent_mutants.txt")
FILES = {
    "advantages": "test_advantages test_reductions test_other_libraries",
    "losses": "test_losses test_reductions test_other_libraries",
    "kl": "test_kl test_reductions test_other_libraries",
    "corrections": "test_corrections test_reductions test_other_libraries",
    "weighting": "test_weighting test_reductions test_other_libraries",
    "objective": "test_objective test_reductions test_other_libraries",
    "sampler/draw": "sampler/test_draw",
}
"""File of the algorithm -> its tests."""
TIMEOUT = 120
"""Seconds after which a mutant that does not end counts as noticed."""

OTHER = {
    **{ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.Pow: [ast.Mult]},
    **{ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.BitXor: [ast.BitOr], ast.FloorDiv: [ast.Mult]},
    **{ast.LShift: [ast.RShift], ast.RShift: [ast.LShift], ast.And: [ast.Or], ast.Or: [ast.And]},
    **{ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt]},
    **{ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]},
}
NAMES = {"min": "max", "amin": "amax", "argmin": "argmax", "any": "all", "sum": "mean"}
NAMES |= {other: one for one, other in NAMES.items()} | {"expm1": "exp"}
DROPPED = {"detach", "clamp", "exp", "expm1", "exp_", "log", "sqrt", "square", "sign", "double", "where"}
"""Methods that are left out: `x.detach()` becomes `x`."""


class Mutant(NamedTuple):
    """One change to one function, or to one constant of a file."""

    file: str
    name: str
    before: str
    after: str
    tree: ast.stmt

    def __str__(self) -> str:
        return f"{self.file}:{self.name}: {self.before} -> {self.after}"


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node."""

    def changed(**fields) -> ast.AST:
        other = copy.copy(node)
        vars(other).update(fields)
        return other

    match node:
        case ast.BinOp() | ast.BoolOp():
            yield from (changed(op=op()) for op in OTHER.get(type(node.op), ()))
        case ast.Compare(ops=[op]):
            yield from (changed(ops=[other()]) for other in OTHER.get(type(op), ()))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int())):  # -1 is most often a dimension
            yield ast.Constant(0)
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield from map(ast.Constant, (1,) if value == 0 else (0, value * 2))
        case ast.IfExp():
            yield changed(body=node.orelse, orelse=node.body)
        case ast.If():
            yield changed(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Name(id="min" | "max" as name):
            yield changed(id=NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield changed(attr=NAMES[name])
        case ast.Call(func=function, args=arguments, keywords=keywords):
            if isinstance(function, ast.Attribute):
                module = isinstance(function.value, ast.Name) and function.value.id in ("torch", "math")
                if function.attr in DROPPED and not module:
                    yield function.value
                elif function.attr in DROPPED and len(arguments) == 1:
                    yield arguments[0]
                if function.attr == "where" and module:
                    yield changed(args=[arguments[0], arguments[2], arguments[1]])
            for keyword in keywords:
                yield changed(keywords=[other for other in keywords if other is not keyword])
                if keyword.arg in ("min", "max"):
                    swapped = ast.keyword(NAMES[keyword.arg], keyword.value)
                    yield changed(keywords=[swapped if other is keyword else other for other in keywords])


def sites(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, index, node) of everything below that may be changed: no text, types, assertions and errors."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                yield node, field, index, child
                if not (isinstance(child, ast.UnaryOp) and isinstance(child.operand, ast.Constant)):
                    yield from sites(child)


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file of `grpo/`, in the order of its text."""
    found = []
    for tree in ast.parse((ROOT / "grpo" / f"{file}.py").read_text()).body:
        match tree:
            case ast.FunctionDef(name=name):
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant() | ast.BinOp()):
                pass
            case _:
                continue
        before = ast.unparse(tree)
        texts = {before}
        for parent, field, index, node in sites(tree):
            for other in variants(node):
                put(parent, field, index, other)
                mutant = copy.deepcopy(tree)
                put(parent, field, index, node)
                if ast.unparse(mutant) not in texts:
                    texts.add(ast.unparse(mutant))
                    found.append(Mutant(file, name, *_difference(before, ast.unparse(mutant)), mutant))
    return found


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    """Set a place that `sites` has named."""
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _difference(before: str, after: str) -> tuple[str, str]:
    """The lines in which two texts differ."""
    one, other = before.split("\n"), after.split("\n")
    if len(one) == len(other):
        pairs = [(a.strip(), b.strip()) for a, b in zip(one, other, strict=True) if a != b]
        return " / ".join(a for a, _ in pairs), " / ".join(b for _, b in pairs)
    return before, after


def apply(mutant: Mutant) -> None:
    """Change the loaded module, for all who have imported from it."""
    module = _module(mutant.file)
    namespace = dict(vars(module))
    code = ast.fix_missing_locations(ast.Module([mutant.tree], []))
    exec(compile(code, f"<mutant of {mutant.file}>", "exec"), namespace)
    old, new = getattr(module, mutant.name), namespace[mutant.name]
    if isinstance(old, FunctionType):
        old, new = inspect.unwrap(old), inspect.unwrap(new)
        old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
        return
    for other in list(sys.modules.values()):
        if vars(other).get(mutant.name) is old:
            setattr(other, mutant.name, new)


class Forks:
    """A plugin of pytest: in place of running the collected tests once, it runs them for every mutant."""

    def __init__(self, mutants: list[Mutant]):
        self.mutants = mutants
        self.survivors: list[Mutant] = []
        functions = {name: f for name, f in vars(_module(mutants[0].file)).items() if isinstance(f, FunctionType)}
        self.codes = {inspect.unwrap(function).__code__: name for name, function in functions.items()}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call) -> None:
        """The first failure ends a fork, before time is spent on a report."""
        if call.excinfo and not call.excinfo.errisinstance(pytest.skip.Exception):
            os._exit(1)

    def pytest_runtestloop(self, session) -> bool:
        """Run all tests once without a mutant, then for each mutant those that call its function, the quick ones first.

        A constant or a default may be read by all. No fixture of these tests outlives a test, so a test that does not
        call the function has nothing else of it.
        """
        assert session.items and not session.testsfailed, "the tests cannot be collected"
        torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # what these import, forks need not import
        torch.use_deterministic_algorithms(False)
        with tempfile.NamedTemporaryFile("r") as file:
            failed = self._fork(lambda: self._measure(session.items, Path(file.name)))
            assert not failed, "tests fail without a mutant"
            facts = ast.literal_eval(file.read())
        items = sorted(session.items, key=lambda item: facts[item.nodeid][1])
        for mutant in self.mutants:
            for_all = mutant.name not in self.codes.values() or mutant.before.startswith("def ")
            chosen = [item for item in items if for_all or mutant.name in facts[item.nodeid][0]]
            if not self._fork(lambda mutant=mutant, chosen=chosen: (apply(mutant), _run(chosen))):
                self.survivors.append(mutant)
        return True

    def _measure(self, items: list[pytest.Item], out: Path) -> None:
        """Write {test: (names of the functions that it calls, seconds)}."""
        facts, called = {}, set()
        sys.setprofile(lambda frame, event, _: called.add(self.codes.get(frame.f_code)))
        for item in items:
            called.clear()
            begin = time.perf_counter()
            _run([item])
            facts[item.nodeid] = (sorted(called - {None}), time.perf_counter() - begin)
        sys.setprofile(None)
        out.write_text(repr(facts))

    def _fork(self, work: Callable[[], object]) -> bool:
        """Whether it failed, in a process of its own."""
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT)
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1] != 0


def _module(file: str):
    return importlib.import_module(f"grpo.{file.replace('/', '.')}")


def _run(items: list[pytest.Item]) -> None:
    """One after the other, as pytest does."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def survivors(mutants: list[Mutant]) -> list[Mutant]:
    """Those of one file that its tests do not notice."""
    settings.register_profile("quick", phases=[Phase.explicit, Phase.generate])  # a failure need not be made small
    settings.load_profile("quick")
    forks = Forks(mutants)
    paths = [str(ROOT / "tests" / f"{name}.py") for name in FILES[mutants[0].file].split()]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not slow and not gpu"]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), tempfile.TemporaryDirectory() as place:
        os.environ["GRPO_TEST_SCRATCH"] = place  # `conftest.py` then leaves the removal to us
        code = pytest.main([*options, "--rootdir", str(ROOT), "-c", str(ROOT / "setup.cfg"), *paths], plugins=[forks])
    assert code == 0, f"{mutants[0].file}: {code!r}"
    return forks.survivors


def reasons() -> dict[str, str]:
    """{mutant: why no test can notice it}."""
    return dict(line.split("  # ") for line in REASONS.read_text().splitlines() if "  # " in line)


def main(argv: list[str] | None = None) -> int:
    """Print the score of each file and its survivors; 1 if one of them has no reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description="Break the algorithm; tests must fail.")
    parser.add_argument("files", nargs="*", metavar="FILE", choices=[*FILES, []], help=f"of {', '.join(FILES)}")
    parser.add_argument("--every", type=int, default=1, help="only every so-many-th mutant")
    options = parser.parse_args(argv)
    why = reasons()
    killed, total, unexplained = 0, 0, 0
    for file in options.files or FILES:
        chosen = mutants(file)[:: options.every]
        alive = survivors(chosen)
        killed, total = killed + len(chosen) - len(alive), total + len(chosen)
        print(f"{file}: {len(chosen) - len(alive)} of {len(chosen)} mutants noticed", flush=True)
        for mutant in alive:
            reason = why.get(str(mutant))
            unexplained += reason is None
            print(f"  {mutant}  # {reason or 'NO TEST NOTICES'}", flush=True)
    print(f"{killed} of {total} noticed ({killed / total:.1%}); {unexplained} survivors without a reason")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
