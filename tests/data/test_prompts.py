"""The prompt format to the letter, the choice of exemplars, and the leak check."""

import pytest

from data import prompts
from data.problem import Problem

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


# ---- templates and system prompts ------------------------------------------------------------------------------------

ASKED = Problem("Question: 1+1?\nSolution:", "2", {"question": "1+1?", "shots": [], "stop": ["\n\nQuestion:"]})


def test_a_template_stands_around_the_question_and_leaves_it_as_it_is():
    (framed,) = prompts.framed([ASKED], None, "Q: {question} \\boxed{} {question}")
    assert framed.prompt == framed.info["turn"] == "Q: 1+1? \\boxed{} 1+1?"
    assert framed.info["question"] == "1+1?" and framed.answer == "2" and "system" not in framed.info
    assert ASKED.prompt.startswith("Question:") and "turn" not in ASKED.info


def test_the_known_templates_have_a_place_for_the_question_and_end_where_the_answer_begins():
    for name, template in prompts.TEMPLATES.items():
        (framed,) = prompts.framed([ASKED], None, name)
        assert framed.prompt.count("1+1?") == 1 and "{question}" not in framed.prompt
        assert framed.info["stop"] == ["\n\nQuestion:", *template.stop]
        assert not framed.prompt.endswith((" ", "\n"))
    assert prompts.TEMPLATES["r1_zero"].text.endswith("\nUser: {question}\nAssistant:")
    assert "</think>" in prompts.TEMPLATES["think"].text and r"\boxed{}." in prompts.TEMPLATES["boxed"].text


def test_a_system_prompt_stands_before_the_prompt_and_replaces_that_of_the_data():
    given = Problem("p", "2", {"system": "old"})
    (framed,) = prompts.framed([given], "Be short.", None)
    assert (framed.prompt, framed.info) == ("Be short.\n\np", {"system": "Be short."})
    (framed,) = prompts.framed([ASKED], "Be short.", "Q: {question}")
    assert framed.prompt == "Be short.\n\nQ: 1+1?"


def test_both_may_be_files(tmp_path):
    (tmp_path / "system.md").write_text("Be\nshort.\n")
    (tmp_path / "around.txt").write_text("Q: {question}\nA:\n")
    (framed,) = prompts.framed([ASKED], str(tmp_path / "system.md"), str(tmp_path / "around.txt"))
    assert framed.prompt == "Be\nshort.\n\nQ: 1+1?\nA:"
    with pytest.raises(ValueError, match=r"system_prompt: nothing\.md cannot be read"):
        prompts.framed([ASKED], "nothing.md", None)


def test_a_template_that_can_not_be_used_is_refused():
    with pytest.raises(ValueError, match=r"prompt_template is 'thinks': must be one of r1_zero, think, boxed, or a"):
        prompts.framed([ASKED], None, "thinks")
    shown = Problem("p", "2", {"question": "1+1?", "shots": [ONE]})
    with pytest.raises(ValueError, match=r"prompt_template: 'think' needs num_shots 0"):
        prompts.framed([shown], None, "think")


def test_turns_of_a_chat():
    def said(problem):
        return [(turn["role"], turn["content"]) for turn in prompts.turns_of(problem)]

    assert said(Problem("p", "2", {})) == [("user", "p")]
    shown = Problem("p", "2", {"question": "1+1?", "shots": [ONE], "system": "s"})
    worked = prompts.worked_answer(ONE)
    assert said(shown) == [("system", "s"), ("user", ONE["question"]), ("assistant", worked), ("user", "1+1?")]
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    several = Problem("user", "2", {"question": "user", "turns": turns, "system": "system"})
    assert said(several) == [(role, role) for role in ("system", "user", "assistant", "user")]
    (framed,) = prompts.framed([several], "other", "Q: {question}")
    assert said(framed) == [("system", "other"), ("user", "user"), ("assistant", "assistant"), ("user", "Q: user")]
