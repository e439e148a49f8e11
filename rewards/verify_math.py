"""Are two answers in LaTeX equal? Loaded in the sandbox alone (`boxed.py`), since hostile texts hang in it.

Math-Verify (https://github.com/huggingface/Math-Verify) parses and compares. Its own time limits are off: they are
alarms, which would end those of the reward's process. Left out: where an answer is in a text, and what form it has.
"""

import logging

import math_verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off


def equal(answer: str, gold: str) -> bool:
    """Whether Math-Verify takes the answer for the gold answer."""
    sides = [math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    return bool(math_verify.verify(*sides, timeout_seconds=None))


def warm() -> None:
    """Load what the first calls load, while files can still be opened."""
    pairs = {r"\frac{1}{2}": "0.5", r"x = \sqrt{2}": r"2^{1/2}", "(1, 2]": "(1,2]", r"\text{even}": "even"}
    pairs |= {r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", "1 + 2i": "2i + 1"}
    pairs |= {
        r"\sin x": r"\cos x",
        r"x \in [-2, 7]": "[-2,7]",
        "5x - 7y = 4": "5x - 7y - 4 = 0",
        r"1 \pm \sqrt{19}": "3",
    }
    pairs |= {r"\{1, 2\}": "1, 2", r"(0,9) \cup (9,36)": "(0,9)", "x^2 + 1": "(x + 1)^2", r"30^\circ": "30"}
    for answer, gold in pairs.items():
        equal(answer, gold)
