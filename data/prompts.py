"""The few-shot prompt for base models, the choice of its exemplars, and the check that no exemplar is also asked.

An example is a dict with `question`, `solution` and `answer`, all strings. A shot is an example shown in the prompt.
Templates of one's own and a system prompt replace that prompt, or stand before it. Left out: chat templates, which need
a tokenizer. They get the turns of `turns_of`.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.problem import Problem
from data.splits import SPLITS

STOP = ["\n\nQuestion:"]
"""After its answer a base model writes the next question. The first words of that question end the completion."""

QUESTION = "{question}"
"""What a template has in the place of the question."""


class Template(NamedTuple):
    """A text around the question, and the strings that end a completion beside those of the data."""

    text: str
    stop: tuple[str, ...] = ()


TEMPLATES = {
    # For base models, as plain text: DeepSeek-R1-Zero, https://arxiv.org/abs/2501.12948 table 1. A base model that has
    # answered goes on with another question.
    "r1_zero": Template(
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: {question}\nAssistant:",
        ("\nUser:",),
    ),
    # For chat models: the system prompt of Open R1's recipes, https://github.com/huggingface/open-r1, in the question's
    # own turn.
    "think": Template(
        "You are a helpful AI Assistant that provides well-reasoned and detailed responses. You first think about the "
        "reasoning process as an internal monologue and then provide the user with the answer. Respond in the "
        "following format: <think>\n...\n</think>\n<answer>\n...\n</answer>\n\n{question}"
    ),
    # For chat models and mathematics: https://github.com/deepseek-ai/DeepSeek-R1, "Usage Recommendations".
    "boxed": Template("{question}\nPlease reason step by step, and put your final answer within \\boxed{}."),
}


def framed(problems: Sequence[Problem], system: str | None, template: str | None) -> list[Problem]:
    """The problems with a system prompt, or with another text around their question.

    Without a chat template the system prompt stands before the prompt, and it replaces one that came with the data.

    Args:
      problems: any number.
      system: the system prompt or the file that holds it (.txt, .md); None: as the data has it.
      template: a name of `TEMPLATES`, or a text or file with `{question}` in it; None: the data's own prompt.

    Raises:
      ValueError: a file cannot be read, the template has no place for the question, or there are worked examples too.
    """
    system = None if system is None else _text(system, "system_prompt")
    around = None if template is None else _template(template)
    if around is not None and any(problem.info.get("shots") for problem in problems):
        raise ValueError(f"prompt_template: {template!r} needs num_shots 0: worked examples have another form")
    return [_framed(problem, system, around) for problem in problems]


def _framed(problem: Problem, system: str | None, template: Template | None) -> Problem:
    prompt, info = problem.prompt, dict(problem.info)
    if template is not None:
        prompt = info["turn"] = template.text.replace(QUESTION, info.setdefault("question", prompt))
        info["stop"] = [*info.get("stop", []), *template.stop]
        info.pop("stop_plain", None)  # it may ask for more than one block
    if system is not None:
        info["system"], prompt = system, f"{system}\n\n{prompt}"
    return replace(problem, prompt=prompt, info=info)


def _template(given: str) -> Template:
    template = TEMPLATES.get(given) or Template(_text(given, "prompt_template"))
    if QUESTION not in template.text:
        known = f"one of {', '.join(TEMPLATES)}, or a text or a file (.txt, .md) with {QUESTION} in it"
        raise ValueError(f"prompt_template is {template.text[:80]!r}: must be {known}")
    return template


def _text(given: str, option: str) -> str:
    """A text, or what stands in the file that is named."""
    if not re.fullmatch(r"\S+\.(txt|md)", given):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{option}: {given} cannot be read ({error})") from error


def turns_of(problem: Problem) -> list[dict[str, str]]:
    """The turns of a chat that ask a problem, each {role, content}: system prompt, worked examples, question."""
    info = problem.info
    turns = [{"role": "system", "content": info["system"]}] if info.get("system") is not None else []
    for shot in info.get("shots", []):
        turns.append({"role": "user", "content": shot["question"]})
        turns.append({"role": "assistant", "content": worked_answer(shot)})
    turns += [turn for turn in info.get("turns", [])[:-1] if turn["role"] != "system"]
    return [*turns, {"role": "user", "content": info.get("turn", info.get("question", problem.prompt))}]


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


def with_shots(
    split: str, draw: Callable[[str, int], list[dict]], num_shots: int, seed: int
) -> tuple[list[dict], list[dict]]:
    """The examples of a split of a generated data set, and the shots of their prompts, which are drawn from train.

    Args:
      split: `train`, which is without the shots, `validation` or `test`.
      draw: (split, seed) -> its examples. Validation and test are those of seed 0, whatever the run's is.
      num_shots: how many shots.
      seed: decides the train split and the shots.

    Raises:
      ValueError: the split is unknown, `num_shots` is out of range, or a shot is also asked.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    train = draw("train", seed)
    shots = choose_shots(train, num_shots, seed)
    examples = without_shots(train, shots) if split == "train" else draw(split, 0)
    check_no_leak(examples, shots)
    return examples, shots


def completed(examples: Sequence[dict], shots: Sequence[dict]) -> list[Problem]:
    """A problem for each example, in the prompt format. `info` has all of the example."""
    return [
        Problem(
            prompt=completion_prompt(example["question"], shots),
            answer=example["answer"],
            info={**example, "shots": shots, "stop": STOP},
        )
        for example in examples
    ]


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
