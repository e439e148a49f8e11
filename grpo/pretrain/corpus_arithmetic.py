"""The corpus of the demo on word problems. It is uneven, like the web:

- most solutions jump to an answer and are often wrong;
- some work step by step and are right;
- some of both kinds lack the answer line;
- every solution is followed by another question.

So the model can solve problems but seldom does so, follows the examples in its prompt, and does not stop. This is what
reinforcement learning then changes. Left out: problems of other splits than train.
"""

import random
import re
from collections.abc import Iterator

from data import arithmetic, prompts
from data.prompts import answer_line

# The share of careful (worked) solutions is drawn for each document from Beta(CAREFUL, HASTY); its mean is 0.32. So a
# model that has seen careful solutions in its context expects another one.
CAREFUL, HASTY = 1.3, 2.8
GUESSED_RIGHT = 0.5
OFF_FORMAT = 0.1
MOST_PROBLEMS = 10
SHEETS = 0.3  # share of documents that are bare equations, without words
GUESSES = ("I think it is {}.", "I guess it is {}.", "I would say {}.")
OFF_FORMAT_ENDINGS = ("#### {}", "The answer is {}.", "Answer: {}")

EQUATION = re.compile(r"\d+ [-+*/] \d+ = \d+")


def document(rng: random.Random, examples: Iterator[dict]) -> str:
    """A document of the corpus: some problems and solutions in a row, in the prompt format."""
    carefulness = rng.betavariate(CAREFUL, HASTY)
    texts = []
    for _ in range(min(MOST_PROBLEMS, 1 + int(rng.expovariate(1 / 3)))):
        example = next(examples)
        completion = worked(example, rng) if rng.random() < carefulness else guessed(example, rng)
        texts.append(f"{prompts.ask(example['question'])} {completion}")
    return "\n\n".join(texts)


def sheet(examples: Iterator[dict]) -> str:
    """A document with only the equations of some worked solutions."""
    return "\n".join(equation for _ in range(12) for equation in EQUATION.findall(next(examples)["solution"]))


def worked(example: dict, rng: random.Random) -> str:
    """A right solution, step by step."""
    return f"{example['solution']}\n{_ending(example['answer'], rng)}"


def guessed(example: dict, rng: random.Random) -> str:
    """A guess, right with probability `GUESSED_RIGHT`; else a number from the problem or a near miss."""
    right = int(example["answer"])
    seen = {int(number) for number in re.findall(r"\d+", example["question"] + example["solution"])}
    slips = {right + slip for slip in (-10, -2, -1, 1, 2, 10) if right + slip > 0}
    wrong = rng.choice([sorted(seen - {right}), sorted(slips)])
    guess = str(right if rng.random() < GUESSED_RIGHT else rng.choice(wrong))
    return f"{rng.choice(GUESSES).format(guess)}\n{_ending(guess, rng)}"


def corpus(seed: int) -> Iterator[str]:
    """An endless stream of documents, made from problems of the train split only."""
    rng = random.Random(f"corpus {seed}")
    examples = arithmetic.stream("train", rng)
    while True:
        yield sheet(examples) if rng.random() < SHEETS else document(rng, examples)


def _ending(answer: str, rng: random.Random) -> str:
    if rng.random() < OFF_FORMAT:
        return rng.choice(OFF_FORMAT_ENDINGS).format(answer)
    return answer_line(answer)
