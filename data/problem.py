"""`Problem`, a prompt with a verifiable answer, and `Task`, how answers are graded. No loading and no grading."""

from dataclasses import dataclass, replace


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
    - `stop`: list of str, the strings that end a completion; `stop_plain`, where there is one, those where there is no
      chat template.
    - `system`, `turn`, `turns`, where there are any: system prompt, the user's last turn if it is not the question, and
      all turns of a prompt that has several.
    - Further entries of the data set."""


@dataclass(frozen=True)
class Task:
    """What rewards and grades the answers to a data set, by names, where the options of a run leave it open.

    A data file states its own as `TASK`. A file without one has these, which are those of GSM8K.
    """

    rewards: tuple[str, ...] = ("gsm8k.format", "gsm8k.correctness")
    """Reward functions of training, as file.function."""
    reward_weights: tuple[float, ...] = (1.0, 1.0)
    """One for each."""
    timeout: float = 5.0
    """Seconds that one call of a reward may take."""
    correct: str = "gsm8k.correctness"
    """The reward function that decides in evaluations whether an answer is right."""
    format: str | None = "gsm8k.format"
    """The one that decides whether it has the format; None: there is no format."""
    graders: tuple[str, ...] = (
        *("marker", "marker_first", "last_number", "published", "lm_eval_strict", "lm_eval_flexible"),
    )
    """Graders of `eval.py`, which are reward functions or entries of `grpo/evaluation/graders.py`."""
    lenient: str | None = "last_number"
    """The grader that reads the answer wherever it stands; None: where it stands makes no difference."""

    def with_rewards(self, rewards: str | tuple[str, ...]) -> "Task":
        """The task if these rewards are given, which have a weight of 1 if they are not its own; or `auto`: none is."""
        if rewards in ("auto", self.rewards):
            return self
        return replace(self, rewards=tuple(rewards), reward_weights=(1.0,) * len(rewards))
