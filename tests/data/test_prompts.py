"""The prompt format to the letter, the choice of exemplars, and the leak check."""

import pytest

from data import prompts

ONE = {"question": "1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}
TWO = {"question": "2 * 540?", "solution": "Two lines.\n2 * 540 = 1080", "answer": "1,080"}


def examples(*lengths: int) -> list[dict]:
    """Examples that are as long as told, each with a question of its own."""
    return [{"question": f"{i:03d}", "solution": "x" * (length - 4), "answer": "7"} for i, length in enumerate(lengths)]


def test_the_prompt_to_the_letter():
    assert prompts.completion_prompt("3 + 4?") == "Question: 3 + 4?\nSolution: Let's think step by step."
    assert prompts.completion_prompt("3 + 4?", [ONE, TWO]) == (
        "Question: 1 + 1?\nSolution: Let's think step by step. 1 + 1 = 2\n#### The final answer is 2\n\n"
        "Question: 2 * 540?\nSolution: Let's think step by step. Two lines.\n2 * 540 = 1080\n"
        "#### The final answer is 1,080\n\n"
        "Question: 3 + 4?\nSolution: Let's think step by step."
    )


def test_the_stop_string_is_where_a_base_model_runs_on():
    prompt = prompts.completion_prompt("3 + 4?", [ONE, TWO])
    start = prompts.ask(ONE["question"])
    assert prompt.startswith(start)
    assert prompt[len(start) :].split(prompts.STOP[0])[0] == " " + prompts.worked_answer(ONE)


def test_shots_come_from_the_eight_times_as_many_shortest():
    pool = examples(*range(500, 100, -1))
    shortest = sorted(map(len_of, pool))[:24]
    drawn = [prompts.choose_shots(pool, 3, seed) for seed in range(200)]
    assert {len_of(shot) for shots in drawn for shot in shots} == set(shortest)
    assert all(len({shot["question"] for shot in shots}) == 3 for shots in drawn)


def test_the_length_counts_question_solution_and_answer_and_the_first_wins_a_tie():
    long_answer = {"question": "q", "solution": "s", "answer": "a" * 40}
    long_question = {"question": "q" * 40, "solution": "s", "answer": "a"}
    long_solution = {"question": "q", "solution": "s" * 40, "answer": "a"}
    pool = [long_answer, long_question, long_solution, *examples(*[20] * 9)]
    assert {shot["question"] for seed in range(100) for shot in prompts.choose_shots(pool, 1, seed)} == {
        f"{i:03d}" for i in range(8)
    }


def test_another_length_can_be_given():
    pool = examples(*range(10, 40))
    drawn = [prompts.choose_shots(pool, 1, seed, length=lambda example: -len_of(example)) for seed in range(100)]
    assert {shot["question"] for [shot] in drawn} == {f"{i:03d}" for i in range(22, 30)}


def test_the_seed_decides_the_shots():
    pool = examples(*range(10, 200))
    assert prompts.choose_shots(pool, 4, 5) == prompts.choose_shots(list(pool), 4, 5)
    assert len({str(prompts.choose_shots(pool, 4, seed)) for seed in range(10)}) == 10
    assert prompts.choose_shots(pool, 0, 5) == []


@pytest.mark.parametrize("num_shots", [-1, 4])
def test_too_many_or_too_few_shots_are_refused(num_shots):
    with pytest.raises(ValueError, match=f"num_shots: {num_shots} is not between 0 and the 3 training examples"):
        prompts.choose_shots(examples(10, 10, 10), num_shots, 0)


def test_shots_are_removed_with_every_copy_of_their_question():
    spaced = {**ONE, "question": " 1 +  1?\n"}
    assert prompts.without_shots([ONE, TWO, spaced], [ONE]) == [TWO]
    assert prompts.without_shots([ONE, TWO], []) == [ONE, TWO]


def test_a_leak_is_refused():
    prompts.check_no_leak([TWO], [ONE])
    prompts.check_no_leak([ONE], [])
    with pytest.raises(ValueError, match=r"num_shots: 1 of 2 questions .* '1 \+  1\?'"):
        prompts.check_no_leak([TWO, {**ONE, "question": "1 +  1?"}], [ONE])


def len_of(example: dict) -> int:
    return sum(map(len, example.values()))
