"""The corpus of the demo on programs. Its authors differ, like those on the web:

- careful ones write what the docstring says;
- hasty ones leave out the parentheses, the last step or a bracket;
- every program is followed by another one.

So the model can write right programs but often does not. This is what reinforcement learning then changes. Left out:
tasks of other splits than train.
"""

import random
from collections.abc import Iterator

from data import programs

CAREFUL, HASTY = 1.0, 2.0
"""The share of careful programs is drawn for each document from Beta(CAREFUL, HASTY); its mean is a third."""
MOST_PROGRAMS = 10


def document(rng: random.Random, examples: Iterator[dict]) -> str:
    """Some programs in a row, in the prompt's form, by one author."""
    carefulness = rng.betavariate(CAREFUL, HASTY)
    texts = []
    for _ in range(min(MOST_PROGRAMS, 1 + int(rng.expovariate(1 / 4)))):
        example = next(examples)
        line = programs.expression(example["calculation"])
        if rng.random() >= carefulness:
            line = hasty(example["calculation"], rng)
        texts.append(f"{programs.ask(example['question'])} {line}")
    return "\n\n".join(texts)


def hasty(calculation: programs.Calculation, rng: random.Random) -> str:
    """The expression as somebody in a hurry writes it. It is right where it needs no parentheses, now and then."""
    first, rest = calculation
    slips = [programs.expression(calculation, parentheses=False)]
    if rest:
        slips.append(programs.expression((first, rest[:-1])))
    right = programs.expression(calculation)
    if ")" in right:
        slips.append(right.replace(")", "", 1))
    return rng.choices(slips, (4, 1, 1)[: len(slips)])[0]


def corpus(seed: int) -> Iterator[str]:
    """An endless stream of documents, made from tasks of the train split only."""
    rng = random.Random(f"programs {seed}")
    examples = programs.stream("train", rng)
    while True:
        yield document(rng, examples)
