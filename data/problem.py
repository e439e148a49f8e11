"""`Problem`, a prompt with a verifiable answer, which all data sets and rewards use. No loading and no grading."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A prompt and the gold answer to it.

    Example: `Problem("Question: 1 + 1?\\nSolution: Let's think step by step.", "2", {"question": "1 + 1?", "shots": [],
    "stop": ["\\n\\nQuestion:"]})`.
    """

    prompt: str
    """The complete text that the policy continues, including exemplars."""
    answer: str
    """The gold answer exactly as in the data, such as `1,080`. Graders normalise it."""
    info: dict
    """More about the problem:

    - `question`: str.
    - `shots`: list of {"question", "solution", "answer"}, in the order of the prompt.
    - `stop`: list of str, the strings that end a completion.
    - `system`, `turn`, `turns`, where there are any: system prompt, the user's last turn if it is not the question, and
      all turns of a prompt that has several.
    - Further entries of the data set."""
