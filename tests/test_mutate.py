"""The tool that breaks the algorithm: what it changes, and that it tells a mistake from a change that does nothing."""

import ast
import os
import subprocess
import sys

import pytest

from tests import mutate


def changed(text: str) -> set[str]:
    """All that the mutator makes of an expression."""
    tree, found = ast.parse(f"def f(): return {text}").body[0], set()
    for parent, field, index, node in mutate.sites(tree):
        for other in mutate.variants(node):
            mutate.put(parent, field, index, other)
            found.add(ast.unparse(tree).split("return ")[1])
            mutate.put(parent, field, index, node)
    assert ast.unparse(tree).endswith(ast.unparse(ast.parse(text)))
    return found


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("a - b", {"a + b"}),
        ("-a / b", {"-a * b", "a / b"}),
        ("a and b", {"a or b"}),
        ("a < b", {"a <= b", "a >= b"}),
        ("a is None", {"a is not None"}),
        ("a.detach()", {"a"}),
        ("torch.exp(a)", {"a"}),
        ("torch.where(a, b, c)", {"torch.where(a, c, b)"}),
        ("a.amax(-1)", {"a.amin(-1)", "a.amax(0)"}),
        ("a.clamp(min=b)", {"a", "a.clamp()", "a.clamp(max=b)"}),
        ("a.sum(keepdim=True)", {"a.mean(keepdim=True)", "a.sum()", "a.sum(keepdim=False)"}),
        ("a if b else c", {"c if b else a"}),
        ("a * 3", {"a / 3", "a * 0", "a * 6"}),
        ("a.f('text')", set()),
    ],
)
def test_what_becomes_of_an_expression(text, others):
    assert changed(text) == others


def test_every_file_of_the_algorithm_has_mutants_and_every_reason_is_of_one():
    known = {str(mutant) for file in mutate.FILES for mutant in mutate.mutants(file)}
    assert {text.split(":")[0] for text in known} == set(mutate.FILES)
    assert set(mutate.reasons()) <= known and all(mutate.reasons().values())


def test_a_mistake_is_noticed_and_a_change_that_does_nothing_is_not():
    script = """
import ast
from tests import mutate
wrong, *_ = mutate.mutants("kl")
tree, = ast.parse("def k1(logprobs, ref_logprobs, old_logprobs=None): return -ref_logprobs + logprobs").body
harmless = wrong._replace(after="the same", tree=tree)
assert mutate.survivors([wrong, harmless, wrong]) == [harmless]
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=mutate.ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
