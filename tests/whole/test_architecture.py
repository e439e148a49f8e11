"""The house stands: floors import downwards only, libraries stay where they belong, files and functions are short."""

import ast
import re
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# One line of layers: a file imports from layers above its own in this list, and within its own without a circle.
LAYERS = {
    "words": "options config files batch distributed metrics",
    "algorithm": "advantages losses kl corrections objective weighting",
    "tree": "tree",
    "kernels": "kernels/",
    "logprobs": "logprobs",
    "policy": "policy/",
    "sampler": "sampler/",
    "phases": "dataloader rollout microbatch budget optimizer update",
    "run": "run/",
    "evaluation": "evaluation/",
    "doctor": "doctor/",
    "report": "report/",
    "commands": "sample sweep pretrain oracle/",
}
ALLOWED = {"kernels": {"kernels"}, "run": {"words", "kernels", "run"}}
"""Layers that stand on fewer than all above them."""
FACES = ("policy", "sampler", "report")
"""Folders of which other layers, from the phases on, import what `__init__.py` hands on and nothing else."""
MATH = [*LAYERS["algorithm"].split(), "sampler/draw"]

PLACES = (".", "grpo", "grpo/*", "rewards", "rewards/*", "data")
PATHS = sorted(path for place in PLACES for path in ROOT.glob(f"{place}/*.py"))
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
MODULES = [file.removeprefix("grpo/").removesuffix(".py") for file in SOURCES if file.startswith("grpo/")]
MODULES.remove("__init__")
every_source = pytest.mark.parametrize("file", SOURCES)


def layer_of(module):
    """The layer of `tree` or `policy/model`."""
    (layer,) = [layer for layer, places in LAYERS.items() if {module, module.split("/")[0] + "/"} & {*places.split()}]
    return layer


def imports(file):
    """Every module that a file imports, anywhere in it; `from grpo import tree` counts as `grpo.tree`."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[file])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("grpo.").replace(".", "/") in MODULES}
            found |= modules or {node.module}
    return found


def ours(module):
    """The modules of `grpo` that a module imports; a folder stands for its face."""
    names = {name.removeprefix("grpo.").replace(".", "/") for name in imports(f"grpo/{module}.py") if "grpo." in name}
    return {name if name in MODULES else f"{name}/__init__" for name in names}


def packages(file):
    return {name.split(".")[0] for name in imports(file)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_the_layers_above_its_own_in_the_list(module):
    layer, order = layer_of(module), list(LAYERS)
    allowed = ALLOWED.get(layer, set(order[: order.index(layer) + 1]))
    used = {name: layer_of(name) for name in ours(module)}
    assert set(used.values()) <= allowed, used
    if order.index(layer) >= order.index("phases"):
        behind = {name for name, of in used.items() if of in FACES and of != layer and not name.endswith("__init__")}
        assert not behind, f"{module} reaches behind a face"
    if module in MATH:
        third_party = packages(f"grpo/{module}.py") - sys.stdlib_module_names
        assert not used and third_party == {"torch"}


def test_no_import_goes_in_a_circle():
    faces = {module for module in MODULES if module.endswith("__init__")}
    above = {module: ours(module) - faces for module in MODULES if module not in faces}
    list(TopologicalSorter(above).static_order())


def test_a_folder_holds_what_one_can_look_over():
    folders = Counter(str(Path(file).parent) for file in SOURCES)
    assert len(folders) > 10 and max(folders.values()) <= 24, folders


@every_source
def test_libraries_stay_where_they_belong(file):
    used = packages(file)
    assert not used & {"trl", "vllm", "ray", "deepspeed", "accelerate", "bench"}
    if "transformers" in used:
        assert file.startswith(("grpo/policy/", "grpo/sampler/", "grpo/pretrain.py"))
    if "matplotlib" in used:
        assert file == "grpo/report/curves.py"
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
    body = ast.parse(SOURCES[f"grpo/{name}.py"]).body
    classes = {node.name for node in body if isinstance(node, ast.ClassDef) and ast.get_docstring(node)}
    public = [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert public
    for function in public:
        text = ast.get_docstring(function) or ""
        one_line = len(function.args.args) == 1 and "[" in text and "\n" not in text  # with the shape in it
        returns = "Returns:" in text or ast.unparse(function.returns) in classes  # which is documented by itself
        assert one_line or ("Args:" in text and returns), function.name


def test_every_line_of_the_page_on_conformance_has_its_tests():
    page = (ROOT / "docs" / "conformance.md").read_text()
    lines = re.findall(r"^\| C(\d\d)(.*)", page, re.M)
    named = {(number, file) for number, files in lines for file in re.findall(r"`([\w/]+\.py)`", files)}
    there = {(number, str(path.relative_to(ROOT / "tests"))) for path in (ROOT / "tests").rglob("*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
             for number in re.findall(r"_c(\d\d)(?=_)", name)}  # fmt: skip
    numbers = {number for number, _ in named}
    assert len(lines) == len(numbers) >= 42, "a line is gone, stands twice or names no file"
    assert named <= there, f"files without a test of that number: {named - there}"
    strange = {(number, file) for number, file in there if number not in numbers}
    assert not strange, f"tests of numbers that the page lacks: {strange}"


@every_source
def test_every_file_says_what_it_is_for(file):
    assert file == "grpo/__init__.py" or ast.get_docstring(ast.parse(SOURCES[file]))
