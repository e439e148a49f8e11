"""The few-shot completion prompt for base models, its exemplars and the check that none of them leaks.

An example is a dict with `question`, `solution` and `answer`, all strings; a shot is an example shown in the prompt.
Chat templates are not applied here: they need a tokenizer, and take the same questions and shots.
"""

import random
from collections.abc import Callable, Sequence

STOP = ["\n\nQuestion:"]
"""A base model that has answered goes on with the next question: its first words end the completion."""


def ask(question: str) -> str:
    """The question as the prompt puts it. No space at the end: the tokens of a solution begin with theirs."""
    return f"Question: {question}\nSolution: Let's think step by step."


def answer_line(answer: str) -> str:
    """The line that an answer stands on."""
    return f"#### The final answer is {answer}"


def worked_answer(shot: dict) -> str:
    """What a perfect completion says: the solution, then the answer on a line of its own."""
    return f"{shot['solution']}\n{answer_line(shot['answer'])}"


def completion_prompt(question: str, shots: Sequence[dict] = ()) -> str:
    """The complete prompt of a question: each shot asked and answered, then the question asked."""
    exemplars = "".join(f"{ask(shot['question'])} {worked_answer(shot)}\n\n" for shot in shots)
    return exemplars + ask(question)


def choose_shots(
    examples: Sequence[dict], num_shots: int, seed: int, *, length: Callable[[dict], int] | None = None
) -> list[dict]:
    """Draws `num_shots` of the `8 * num_shots` shortest examples; the seed decides which and in what order.

    Args:
      examples: the training examples; ties in length go to the earlier one.
      num_shots: how many, 0 or more.
      seed: the same seed draws the same shots.
      length: characters of an example, default those of question + solution + answer.

    Raises:
      ValueError: `num_shots` is negative or more than there are examples.
    """
    if not 0 <= num_shots <= len(examples):
        raise ValueError(f"num_shots: {num_shots} is not between 0 and the {len(examples)} training examples")
    shortest = sorted(examples, key=length or _length)[: 8 * num_shots]
    return random.Random(f"shots {seed}").sample(shortest, num_shots)


def without_shots(examples: Sequence[dict], shots: Sequence[dict]) -> list[dict]:
    """The examples whose question is none of the shots'. For training and validation; a test set is never thinned."""
    shown = {_words(shot["question"]) for shot in shots}
    return [example for example in examples if _words(example["question"]) not in shown]


def check_no_leak(examples: Sequence[dict], shots: Sequence[dict]) -> None:
    """Raises ValueError if a shot's question, up to white space, is also asked: its answer would be in the prompt."""
    shown = {_words(shot["question"]) for shot in shots}
    leaks = [example["question"] for example in examples if _words(example["question"]) in shown]
    if leaks:
        raise ValueError(
            f"num_shots: {len(leaks)} of {len(examples)} questions are also exemplars of their own prompt, the first: "
            f"{leaks[0]!r}; remove them from the data, or choose other exemplars with another seed"
        )


def _length(example: dict) -> int:
    return len(example["question"]) + len(example["solution"]) + len(example["answer"])


def _words(question: str) -> str:
    return " ".join(question.split())
