"""The house stands: floors import downwards only, libraries stay where they belong, files and functions are short."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {  # a module imports from lower floors, and from those before it on its own
    0: "files options config batch distributed version machine",
    1: "advantages losses kl corrections objective weighting draw",
    2: "tree compiled onednn decode fused_logprobs logprobs attention_flex attention_parts attention lean float64 "
    "model reference cache narrow decoder_fused stops rows generate checkpoint metrics",
    3: "headline curves statistics graders grading protocol transcripts probes rollout microbatch update compare "
    "facts memory check_data check_algorithm diagnose watch signals directory sample pretrain page sweep",
}
ORDER = [name for floor in FLOORS.values() for name in floor.split()]
MATH = FLOORS[1].split()

PLACES = (".", "grpo", "grpo/*", "rewards", "data")
PATHS = sorted(path for place in PLACES for path in ROOT.glob(f"{place}/*.py"))
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
FILES = {Path(file).stem: file for file in SOURCES if file.startswith("grpo/") and "__" not in file}
every_source = pytest.mark.parametrize("file", SOURCES)


def imports(file):
    """Every module that a file imports, anywhere in it; `from grpo import tree` counts as `grpo.tree`."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[file])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            whole = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def packages(file):
    return {name.split(".")[0] for name in imports(file)}


def test_every_module_has_its_place():
    assert sorted(FILES) == sorted(ORDER)


@pytest.mark.parametrize("place", range(len(ORDER)), ids=ORDER)
def test_a_module_imports_from_below_only(place):
    file = FILES[ORDER[place]]
    ours = {part for name in imports(file) if name.startswith("grpo.") for part in name.split(".")} & set(ORDER)
    assert ours <= set(ORDER[:place])
    if ORDER[place] in MATH:
        third_party = packages(file) - sys.stdlib_module_names
        assert not ours and third_party == {"torch"}


@every_source
def test_libraries_stay_where_they_belong(file):
    used = packages(file)
    assert not used & {"trl", "vllm", "ray", "deepspeed", "accelerate", "bench"}
    if "transformers" in used:
        assert file in {FILES[name] for name in ("model", "attention", "stops", "generate", "pretrain")}
    if "datasets" in used:
        assert file.startswith("data/")
    if file.startswith(("rewards/", "data/")):
        assert not used & {"torch", "grpo"}


@every_source
def test_files_and_functions_keep_their_budget(file):
    assert SOURCES[file].count("\n") <= 320
    assert Path(file).stem not in {"utils", "common", "helpers", "types", "math", "misc"}
    for node in ast.walk(ast.parse(SOURCES[file])):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name


@pytest.mark.parametrize("name", MATH)
def test_every_public_function_of_the_math_says_what_goes_in_and_out(name):
    body = ast.parse(SOURCES[FILES[name]]).body
    classes = {node.name for node in body if isinstance(node, ast.ClassDef) and ast.get_docstring(node)}
    public = [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert public
    for function in public:
        text = ast.get_docstring(function) or ""
        one_line = len(function.args.args) == 1 and "[" in text and "\n" not in text  # with the shape in it
        returns = "Returns:" in text or ast.unparse(function.returns) in classes  # which is documented by itself
        assert one_line or ("Args:" in text and returns), function.name


def test_every_test_that_the_page_on_conformance_names_is_in_its_file():
    page = (ROOT / "docs" / "conformance.md").read_text()
    named = {(file, name) for file, names in re.findall(r"^- \[tests/(\w+\.py)\].*?: (.*)$", page, re.M)
             for name in re.findall(r"`(test_\w+)`", names)}  # fmt: skip
    there = {(path.name, name) for path in (ROOT / "tests").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}  # fmt: skip
    assert len(named) > 100 and named <= there, named - there


@every_source
def test_every_file_says_what_it_is_for(file):
    assert file == "grpo/__init__.py" or ast.get_docstring(ast.parse(SOURCES[file]))
