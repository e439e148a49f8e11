"""Rewards of Reasoning Gym: tags, every task's gold answers, and answers that its scorers would execute."""

import ast

import pytest

import data
from data.problem import Problem
from rewards import gym
from tests.fakes.sealing import only_here

reasoning_gym = pytest.importorskip("reasoning_gym")
linux = only_here
TASKS = sorted(set(reasoning_gym.factory.DATASETS) - set(data.importlib.import_module("data.gym").REFUSED))


@pytest.mark.parametrize(
    ("text", "value"),
    [("so\n<answer>4</answer>", 0.5), ("<answer>4</answer> \n", 0.5), ("<answer>4</answer>.", 0.0), ("4", 0.0)]
    + [
        ("<answer></answer>", 0.0),
        ("<answer>4", 0.0),
        ("4</answer>", 0.0),
        ("<answer>1</answer><answer>2</answer>", 0.0),
    ]
    + [("<answer>1<answer>2</answer>", 0.0), ("<answer>1</answer></answer>", 0.0), ("<answer>4\n5</answer>", 0.5)],
)
def test_format_is_one_pair_of_tags_at_the_end(text, value):
    assert gym.format(text, Problem("", "4", {})) == value


@pytest.fixture(scope="module")
def problem_of():
    module = data.importlib.import_module("data.gym")
    sizes, module.SIZES = module.SIZES, {"train": 1, "validation": 1, "test": 1}
    yield lambda name: data.load("gym", "test", path=f"{name}:size=1")[0]
    module.SIZES = sizes


def answered(problem, answer):
    return gym.score(f"It is <answer>1</answer>, no, <answer>{answer}</answer>.", problem)


@linux
@pytest.mark.parametrize(
    "name", ["countdown", "simple_integration", "knights_knaves", "arc_agi", "spiral_matrix", "gcd"]
)
def test_golds_are_right_and_questions_are_not(problem_of, name):
    check_golds(problem_of(name))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_golds_of_every_task_are_right_and_questions_are_not(problem_of, name):
    check_golds(problem_of(name))


def check_golds(problem):
    if problem.answer:
        assert gym.correctness(f"<answer>{problem.answer}</answer>", problem) == 1.0
    for text in ("banana", "", "0 1", problem.info["question"], "x" * 5000):
        assert gym.correctness(f"<answer>{text}</answer>", problem) == 0.0
    assert gym.correctness(problem.answer, problem) == 0.0


@linux
def test_parts_are_paid_by_the_score_alone_and_tips_are_nothing(problem_of):
    problem = problem_of("gcd")
    part = answered(problem, f"{problem.answer} banana")
    assert 0.0 < part < 0.5 and gym.correctness(f"<answer>{problem.answer} banana</answer>", problem) == 0.0
    tipped = problem_of("color_cube_rotation")
    dataset = reasoning_gym.create_dataset("color_cube_rotation", seed=0, size=1)
    assert dataset.score_answer("banana", dataset[0]) == 0.01 and answered(tipped, "banana") == 0.0
    assert answered(problem_of("prime_factorization"), "banana") == 0.0  # the scorer raises


FORGED = ["__import__('os').write(4, b'x')", "[__import__('os').system('touch owned')]", "[str(open('owned', 'w'))]"]
FORGED += ["[[x for x in ().__class__.__base__.__subclasses__()]]", "1/exec('1')", "x.func", "(lambda: 1)()", "S('1')"]
FORGED += ["preview(x)", "[f'{open}']", "sqrt.__globals__", "\\u005f", "@x"]
FORGED += ["oracle_answer", 'entry["answer"]', 'entry["metadata"]["solutions"][0]', "[*valid_solutions]", "[y:=1]"]
FRAME = "+".join(f"b'%c'%{c}" for c in b'\0\0\0\x0e{"value": 1.0}')
SENT = f"[0 for __builtins__['memoryview'] in [lambda x: {FRAME}]]"
"""It makes the sandbox itself send the full score, without a call."""


@linux
@pytest.mark.parametrize("name", gym.ALLOWED)
def test_scorers_that_execute_an_answer_get_none_that_could_do_a_thing(problem_of, name, monkeypatch):
    problem = problem_of(name)
    assert gym.ALLOWED[name].fullmatch(problem.answer) and answered(problem, problem.answer) == 1.0
    monkeypatch.setattr(gym, "_scored", lambda *asked: pytest.fail(f"it was scored: {asked}"))
    for text in [*FORGED, SENT]:
        assert answered(problem, text) == 0.0


@linux
def test_countdown_takes_its_numbers_and_four_operations_alone(problem_of):
    problem = problem_of("countdown")
    metadata = ast.literal_eval(problem.info["entry"])["metadata"]
    ones = "+".join(["x/x"] * int(metadata["target"]))
    assert answered(problem, f"(x-x)*({'+'.join(map(str, metadata['numbers']))})+{ones}") == 0.0
    assert gym.ARITHMETIC.fullmatch("42*(30 - 4)/2") and not any(map(gym.ARITHMETIC.fullmatch, ("2**3", "7//2", "1.5")))


@pytest.mark.parametrize(
    "text", ["42*(30 - 4)/2", "189*x**2 + 12x", "X**2/2 + C", "2*sin(3*x) + exp(x)^2", "log(x)", "-.5"]
)
def test_formulas_are_let_through(text):
    assert gym.FORMULA.fullmatch(text)


def test_all_that_execute_are_known():
    """Asked of the library itself: in every other task such an answer leaves no file. See the slow test."""
    assert set(gym.ALLOWED) <= set(TASKS) and len(gym.ALLOWED) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_no_other_scorer_executes_an_answer(name, tmp_path):
    dataset = reasoning_gym.create_dataset(name, seed=5, size=2)
    deed = f"open({str(tmp_path / 'owned')!r}, 'w')"
    for entry in (dataset[0], dataset[1]):
        for text in (deed, f"[{deed}]", f"[[{deed}]]", f"[str({deed})]", f"1/{deed}", f"{deed} + C", f"x = {deed}"):
            try:
                dataset.score_answer(text, entry)
            except Exception:
                continue
    assert (tmp_path / "owned").exists() == (name in gym.ALLOWED)


@pytest.mark.parametrize("text", ["<answer>", "</answer>", "<answer>1</answer>", "<answer", "<answer>1</answer> "])
def test_a_megabyte_is_read_in_linear_time(text, monkeypatch):
    # Quadratic time on a million characters is hours, so that a failure shows as a test that does not end.
    monkeypatch.setattr(gym, "_scored", lambda *asked: 0.0)
    long = text * (10**6 // len(text))
    assert gym.score(long, Problem("", "", {"task": "countdown", "options": {}, "entry": ""})) == 0.0
    assert gym.format(long, Problem("", "", {})) == 0.0


def test_a_long_row_of_digits_or_letters_is_refused_at_once():
    for text in ("1" * 3999 + "!", "x" * 3999 + "!", "1x" * 1999 + "!", "sin" * 1300 + "!", "1." * 1999 + "!"):
        assert not gym.FORMULA.fullmatch(text)


def test_without_the_library_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package reasoning-gym: pip install 'grpo\[gym\]'"):
        gym.prepare()
