"""Problems -> prompts: chooses the problems of each step, and makes the text and tokens of their prompts.

A step's problems are a function of (seed, step), so a resumed run continues the same order without stored state. Left
out: where problems come from (`data/`).
"""

import zlib
from collections.abc import Sequence

import numpy as np

from data.problem import Problem
from data.prompts import worked_answer
from grpo import distributed


def draw_prompts(num_problems: int, prompts_per_step: int, seed: int, step: int) -> list[int]:
    """Choose the problems of a step.

    Random permutations of the training set, one per epoch, are put end to end; each step takes the next N entries.

    Args:
        num_problems: size of the training set.
        prompts_per_step: N.
        seed: seed of the run.
        step: counted from 1.

    Returns:
        N indices into the training set, in the order of the prompts of the step.
    """
    stream = range((step - 1) * prompts_per_step, step * prompts_per_step)
    epochs = {place // num_problems for place in stream}
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(num_problems) for epoch in epochs}
    return [int(order[place // num_problems][place % num_problems]) for place in stream]


def render(problem: Problem, tokenizer, chat: bool) -> str:
    """The text that the policy completes: `problem.prompt`, or under `chat` its chat template, exemplars as turns."""
    if not chat:
        return problem.prompt
    turns = []
    for shot in problem.info.get("shots", []):
        turns += [
            {"role": "user", "content": shot["question"]},
            {"role": "assistant", "content": worked_answer(shot)},
        ]
    turns.append({"role": "user", "content": problem.info.get("question", problem.prompt)})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def encode_prompts(
    problems: Sequence[Problem], tokenizer, *, chat: bool, max_prompt_tokens: int, advice: str = ""
) -> list[np.ndarray]:
    """Tokenize every prompt once, at start-up.

    Args:
        problems: any number.
        tokenizer: it adds its special tokens, except under `chat`, where the template has written them.
        chat: render through the chat template.
        max_prompt_tokens: a longer prompt is an error; nothing is cut in silence.
        advice: what else can be done about prompts that are too long or empty, for the error.

    Returns:
        One int32 array per problem.

    Raises:
        ValueError: a prompt is too long or has no token, or `chat` is True and the tokenizer has no template.
    """
    encoded = encode_all(problems, tokenizer, chat)
    lengths = [len(row) for row in encoded]
    if 0 in lengths:
        raise ValueError(
            f"data: {lengths.count(0)} of {len(lengths)} prompts have no token; nothing can follow them{advice}"
        )
    too_long = [length for length in lengths if length > max_prompt_tokens]
    if too_long:
        raise ValueError(
            f"max_prompt_tokens: {len(too_long)} of {len(lengths)} prompts are longer than {max_prompt_tokens} tokens, "
            f"the longest {max(too_long)}; allow more, or use fewer shots{advice}"
        )
    return encoded


def encode_all(problems: Sequence[Problem], tokenizer, chat: bool) -> list[np.ndarray]:
    """Tokenize prompts of any length.

    Raises:
        ValueError: `chat` needs a template that is not there.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("chat: True needs a tokenizer with a chat template, and this model's has none")
    texts = [render(problem, tokenizer, chat) for problem in problems]
    encoded: list[np.ndarray] = []
    for start in range(0, len(texts), 1024):
        ids = tokenizer(texts[start : start + 1024], add_special_tokens=not chat).input_ids
        encoded += [np.asarray(row, dtype=np.int32) for row in ids]
    return encoded


def skip_long(
    problems: Sequence[Problem], encoded: Sequence[np.ndarray], max_prompt_tokens: int
) -> tuple[list[Problem], list[np.ndarray]]:
    """The problems whose prompt has a token and is not too long, with their tokens; for training only.

    Raises:
        ValueError: there is none.
    """
    kept = [pair for pair in zip(problems, encoded, strict=True) if 0 < len(pair[1]) <= max_prompt_tokens]
    if not kept:
        raise ValueError(
            f"max_prompt_tokens: none of the {len(encoded)} training prompts has a token and at most "
            f"{max_prompt_tokens} of them, so skip_long_prompts leaves none; allow more, or use fewer shots"
        )
    return [problem for problem, _ in kept], [ids for _, ids in kept]


def stop_strings(problems: Sequence[Problem]) -> list[str]:
    """The stop strings that come with the prompt format, sorted.

    Raises:
        ValueError: problems have different stop strings. The sampler cuts all completions by the same ones.
    """
    found = {tuple(sorted(set(problem.info.get("stop", [])))) for problem in problems}
    if len(found) > 1:
        several = " and ".join(str(list(stop)) for stop in sorted(found)[:2])
        raise ValueError(f"data: problems have different stop strings ({several}); all of a set must have the same")
    return list(*found)


def refuse_unequal(problems: Sequence[Problem]) -> None:
    """Raise ValueError on every rank if the ranks have different problems. A collective call.

    Ranks divide the problems among them by index, so all must have the same ones in the same order.
    """
    content = repr([(problem.prompt, problem.answer) for problem in problems])
    if len(set(distributed.gather_objects(zlib.crc32(content.encode(errors="replace"))))) > 1:
        raise ValueError(
            "data: processes were given different problems, or a different order; the file in data/ must give the same "
            "list to all (does it iterate over a set, or draw without a seed?)"
        )
