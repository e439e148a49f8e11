"""The few-shot prompt for base models, the choice of its exemplars, and the check that no exemplar is also asked.

An example is a dict with `question`, `solution` and `answer`, all strings. A shot is an example shown in the prompt.
Left out: chat templates, which need a tokenizer. They use the same questions and shots.
"""

import random
from collections.abc import Callable, Sequence

STOP = ["\n\nQuestion:"]
"""After its answer a base model writes the next question. The first words of that question end the completion."""


def ask(question: str) -> str:
    """The question in the prompt format. It ends without a space, since the first token of a solution has one."""
    return f"Question: {question}\nSolution: Let's think step by step."


def answer_line(answer: str) -> str:
    """The line that states an answer."""
    return f"#### The final answer is {answer}"


def worked_answer(shot: dict) -> str:
    """A perfect completion: the solution, then the answer on its own line."""
    return f"{shot['solution']}\n{answer_line(shot['answer'])}"


def completion_prompt(question: str, shots: Sequence[dict] = ()) -> str:
    """The complete prompt: each shot with its answer, then the question."""
    exemplars = "".join(f"{ask(shot['question'])} {worked_answer(shot)}\n\n" for shot in shots)
    return exemplars + ask(question)


def choose_shots(
    examples: Sequence[dict], num_shots: int, seed: int, *, length: Callable[[dict], int] | None = None
) -> list[dict]:
    """Draw `num_shots` of the `8 * num_shots` shortest examples. The seed decides which ones and their order.

    Args:
      examples: the training examples. Of equally long ones the earlier comes first.
      num_shots: how many, 0 or more.
      seed: the same seed draws the same shots.
      length: length of an example; default: characters of question + solution + answer.

    Raises:
      ValueError: `num_shots` is negative or more than there are examples.
    """
    if not 0 <= num_shots <= len(examples):
        raise ValueError(f"num_shots: {num_shots} is not between 0 and the {len(examples)} training examples")
    shortest = sorted(examples, key=length or _length)[: 8 * num_shots]
    return random.Random(f"shots {seed}").sample(shortest, num_shots)


def without_shots(examples: Sequence[dict], shots: Sequence[dict]) -> list[dict]:
    """The examples whose question is not a shot. Use it for training and validation; a test set stays complete."""
    shown = {_words(shot["question"]) for shot in shots}
    return [example for example in examples if _words(example["question"]) not in shown]


def check_no_leak(examples: Sequence[dict], shots: Sequence[dict]) -> None:
    """Raise ValueError if a shot is also asked, since its answer is in the prompt. White space is ignored."""
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
