"""Tasks of Reasoning Gym as data: options, refusals, and splits that share no question."""

import ast

import pytest

from data import gym, load

reasoning_gym = pytest.importorskip("reasoning_gym")


def questions(split, path, **options):
    return [problem.info["question"] for problem in load("gym", split, path=path, **options)]


def test_a_problem_has_what_its_scorer_needs():
    problem = load("gym", "train", path="leg_counting:size=5,max_animals=3")[0]
    entry = ast.literal_eval(problem.info["entry"])
    assert entry["question"] == problem.info["question"] and entry["answer"] == problem.answer
    assert (problem.info["task"], problem.info["options"]) == ("leg_counting", {"max_animals": 3})
    asked = problem.info["question"]
    assert problem.prompt == f"Question: {asked}\nPut the answer between <answer> and </answer>.\nSolution:"


def test_an_entry_comes_back_as_it_was_with_its_tuples_and_without_numpy():
    for name in ("arc_agi", "knights_knaves"):
        entry = ast.literal_eval(load("gym", "train", path=f"{name}:size=1")[0].info["entry"])
        assert entry == reasoning_gym.create_dataset(name, seed=2 * 2 * gym.LARGEST, size=1)[0]


@pytest.mark.parametrize("name", ["gcd", "leg_counting", "word_sorting"])
def test_no_question_is_in_two_splits_or_twice(name):
    """The library draws item i of seed s as item i + 1 of seed s - 1: neighbours of a seed share nearly everything."""
    parts = {split: questions(split, f"{name}:size=300") for split in ("train", "validation", "test")}
    assert not set(parts["train"]) & set(parts["test"]) and not set(parts["train"]) & set(parts["validation"])
    assert all(len(set(part)) == len(part) > 20 for part in parts.values())


def test_seeds_have_other_training_problems_and_the_same_tests():
    first, other = (set(questions("train", "gcd:size=300", seed=seed)) for seed in (0, 1))
    assert len(first & other) < 30
    assert questions("train", "gcd:size=300") == questions("train", "gcd:size=300")
    assert questions("test", "gcd:size=300", seed=0) == questions("test", "gcd:size=300", seed=1)


def test_exemplars_show_answers_and_are_not_asked():
    asked = load("gym", "train", path="gcd:size=100", num_shots=2)
    shots = asked[0].info["shots"]
    assert not {shot["question"] for shot in shots} & {problem.info["question"] for problem in asked}
    assert asked[0].prompt.count("<answer>") == 5
    for shot in shots:
        assert f"Solution: <answer>{shot['answer']}</answer>\n\nQuestion:" in asked[0].prompt


@pytest.mark.parametrize(
    ("path", "message"),
    [(None, "'' is not one of ab, acre,.*; name a task, such as countdown:"), ("countdwn", "; did you mean countdown")]
    + [("gcd:sizes=3", "'sizes' is not one of the options of 'gcd': min_numbers, max_numbers.*, size")]
    + [("gcd:size=0", "size=0 must be a whole number from 1 to"), ("gcd:min_numbers=9", "'gcd' does not take .*min_")]
    + [("gcd:min_numbers=two", "'gcd' does not take"), ("gcd:size=2,seed=3", "'seed' is not one of the options")]
    + [("game_of_life_halting", "is refused: its scorer pays in full for any text")]
    + [("list_functions", "is refused: it does not follow its seed"), ("composite", "is refused: it takes data sets")],
)
def test_a_wrong_path_is_one_sentence(path, message):
    with pytest.raises(ValueError, match=message):
        load("gym", "train", path=path)


def test_a_task_without_gold_answers_has_no_exemplars():
    assert load("gym", "test", path="rush_hour:size=3")[0].answer == ""
    with pytest.raises(ValueError, match="num_shots: 1, but task 'rush_hour' of data 'gym' has no gold answers"):
        load("gym", "test", path="rush_hour:size=3", num_shots=1)


def test_what_is_refused_is_as_bad_as_said():
    halting = reasoning_gym.create_dataset("game_of_life_halting", seed=1, size=3)
    assert {halting.score_answer("banana", entry) for entry in halting} == {1.0}
    paid_for = {"coin_flip": "0", "complex_arithmetic": "nan", "puzzle24": "6*4*1*1"}
    for name, answer in paid_for.items():
        dataset = reasoning_gym.create_dataset(name, seed=1, size=3)
        assert {dataset.score_answer(answer, entry) for entry in dataset} == {1.0}
    drawn = [[e["question"] for e in reasoning_gym.create_dataset("list_functions", seed=1, size=5)] for _ in range(2)]
    assert drawn[0] != drawn[1]
