"""Try a model on one prompt: `python -m grpo.sample MODEL --prompt TEXT` prints completions of the sampler.

`--question` puts a question into the prompt format of word problems, `--chat` into the model's chat template. Left out:
conversations.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from data.problem import Problem
from data.prompts import STOP, completion_prompt, framed
from grpo import distributed, options
from grpo.batch import Completions
from grpo.dataloader import encode_all
from grpo.options import option
from grpo.policy import load_policy
from grpo.run.log import say
from grpo.run.machine import settings, settle
from grpo.sampler import Sampler


@dataclass(frozen=True)
class SampleOptions:
    """Complete one prompt with a model. The model may come first: python -m grpo.sample MODEL --prompt TEXT."""

    model: str = "embedded"
    """embedded, embedded_programs, a local directory such as runs/NAME/final, or a hub name."""
    prompt: str | None = None
    """The text to complete, used as it is; None: read it from standard input."""
    question: str | None = None
    """A question that is put into the prompt format of word problems (arithmetic, gsm8k). A model that was trained on
    other data, such as programs, needs its whole `prompt`, and its `stop`."""
    chat: bool = False
    """Put `question` or `prompt` into the tokenizer's chat template."""
    system_prompt: str | None = None
    """As in training: the text of the system turn, or a file with it; without chat it stands before the prompt."""
    prompt_template: str | None = None
    """As in training: r1_zero, think or boxed, or a text or file with {question} in it."""
    num: int = option(1, ">= 1")
    """Number of completions."""
    max_new_tokens: int = option(128, ">= 1")
    """Longest completion in tokens."""
    temperature: float = option(0.0, ">= 0 and finite")
    """Sampling temperature; 0: greedy."""
    seed: int = option(0, ">= 0 and < 2**63")
    """Seed of sampling."""
    stop: tuple[str, ...] = option((), verbatim=True)
    """Strings that end a completion; with `question`, the prompt format sets them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: cuda if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Dtype of the matrix products. auto: bf16 on cuda, fp32 on cpu."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that is out of its range."""
        options.check(self)
        if self.prompt is not None and self.question is not None:
            raise ValueError("question: give either --prompt or --question, not both")


def complete(chosen: SampleOptions, device: torch.device) -> Completions:
    """The completions that were asked for, by options without an `auto`."""
    text, stop = chosen.prompt, list(chosen.stop)
    if chosen.question is not None:
        text, stop = completion_prompt(chosen.question), STOP
    elif text is None:
        text = sys.stdin.read()
    asked = Problem(text, "", {"question": chosen.question or text, "stop": stop})
    (problem,) = framed([asked], chosen.system_prompt, chosen.prompt_template)
    policy, tokenizer = load_policy(chosen.model, device=device, precision=chosen.precision)
    return Sampler(policy, tokenizer).generate(
        [ids.tolist() for ids in encode_all([problem], tokenizer, chosen.chat)],
        group_size=chosen.num,
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        seed=chosen.seed,
        step=0,
        stop=problem.info["stop"],
    )


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 0, or 2 for a wrong option or input."""
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    chosen = options.parse(SampleOptions, argv, "grpo.sample")
    try:
        device = distributed.init(chosen.device)
        with settings(device):
            completions = complete(settle(chosen, device), device)
    except (ValueError, OSError) as error:
        say(f"grpo.sample: error: {error}")
        return 2
    for completion, finished in zip(completions.texts, completions.finished.tolist(), strict=True):
        print(completion)
        print(f"--- {'stopped' if finished else 'cut at max_new_tokens'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
