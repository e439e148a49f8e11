"""Problems -> prompts: the text and tokens of their prompts, and which of them are fit for training.

`ProblemSets` holds what was loaded and tokenized, for all who need it. Left out: where problems come from (`data/`),
and which of them a step draws (`prompts/`).
"""

import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property

import numpy as np

import data
from data.problem import Problem
from data.prompts import turns_of
from grpo import distributed
from grpo.config import Config
from grpo.policy import load_shapes
from grpo.prompts.source import Source

DAY = datetime(2024, 7, 26)
"""What a chat template that asks for the date (Llama 3.2, Granite) is told, on every day: the same seed has to give the
same prompts, also to a run that is resumed and to all evaluations. It is the day that Llama 3.2 takes without a clock.
"""
DRAWS = re.compile(r"\|\s*random\b|\blipsum\b")
"""What in a chat template draws at random."""


class ProblemSets:
    """The problems that a model is asked, and their prompts. Nothing is loaded or tokenized before it is asked for.

    All that looks at the problems of a run shares one of these: the doctor, the rollout and the evaluations. So each
    set is loaded once, and each prompt is tokenized once.
    """

    def __init__(self, source: Source, known: Mapping[tuple[str, int], list[Problem]] | None = None):
        """Keep the options; nothing is read yet. `known`: {(split, shots): problems} that need not be loaded."""
        self.source = source
        self._problems = dict(known or {})
        self._prompt_ids: dict[tuple[str, int], list[np.ndarray]] = {}

    @cached_property
    def shapes(self) -> tuple:
        """The model without weights, and its tokenizer, as `load_shapes` gives them."""
        return load_shapes(self.source.model, self.source.revision)

    def problems(self, split: str, num_shots: int, limit: int = 0) -> list[Problem]:
        """The first `limit` problems of a split (0: all), with so many worked examples in each prompt.

        Raises:
            ValueError: as `data.load`.
        """
        key, source = (split, num_shots), self.source
        if key not in self._problems:
            self._problems[key] = data.load(source.data, split, num_shots=num_shots, **source.loading())
        return self._problems[key][: limit or None]

    def prompt_ids(self, split: str, num_shots: int, limit: int = 0) -> list[np.ndarray]:
        """The tokens of the prompts of `problems`, of any length: one int32 array for each.

        Raises:
            ValueError: as `problems`, `load_shapes` and `encode_all`.
        """
        problems, known = self.problems(split, num_shots, limit), self._prompt_ids.setdefault((split, num_shots), [])
        known += encode_all(problems[len(known) :], self.shapes[1], self.source.chat)
        return known[: len(problems)]

    def of_model(self, model: str, revision: str | None = None) -> "ProblemSets":
        """The same problems for another model. If its tokenizer is the same, it shares the tokens too."""
        other = ProblemSets(replace(self.source, model=model, revision=revision), self._problems)
        if _tokenization(other.shapes[1]) == _tokenization(self.shapes[1]):
            other._prompt_ids = self._prompt_ids
        return other


def _tokenization(tokenizer) -> object:
    """What is equal for two tokenizers only if they make the same tokens of the same turns and texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # its rules are code of its own
        return tokenizer
    rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}  # of its last call
    return type(tokenizer), rules, tokenizer.split_special_tokens, tokenizer.chat_template


def render(problem: Problem, tokenizer, chat: bool) -> str:
    """The text that the policy completes: `problem.prompt`, or under `chat` its chat template, exemplars as turns.

    A system prompt that came with the data is the first turn; without `chat` it is no part of the prompt.

    Raises:
        ValueError: the template can not render it, or leaves the system prompt or the question out, or several turns
            are to be a plain text.
    """
    if not chat:
        if problem.info.get("turns"):
            raise ValueError("chat: the data has prompts of several turns, which need chat True")
        return problem.prompt
    system = problem.info.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"data: 'system' is {system!r}: must be a text, the system prompt, where chat is True")
    turns = turns_of(problem)
    text = fill_template(tokenizer, turns, add_generation_prompt=True)
    for what, said in (("system prompt", system or ""), ("question", turns[-1]["content"])):
        if said.strip() not in text:
            raise ValueError(f"chat: the template of this tokenizer leaves the {what} out ({said[:60]!r})")
    return text


def fill_template(tokenizer, turns: list[dict], *, add_generation_prompt: bool) -> str:
    """What the tokenizer's chat template makes of these turns, on the day `DAY`; ValueError with its own words."""
    asked: dict = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        if reads_clock(tokenizer):
            asked["chat_template"] = _clock_at(DAY) + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(turns, **asked)
    except Exception as error:  # whatever a template raises or runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(f"chat: the tokenizer's template can not render turns of {roles}: {reason}") from error


def reads_clock(tokenizer) -> bool:
    """Whether the tokenizer's chat template asks for the date."""
    return "strftime_now" in str(tokenizer.chat_template)


def _clock_at(moment: datetime) -> str:
    """The beginning of a chat template whose `strftime_now` is a macro that always says this moment."""
    letters = "aAbBcdDeFGHhIjklmMpPrRSTuUVwWxXyYZ"
    codes = {f"%{flag}{letter}": moment.strftime(f"%{flag}{letter}") for letter in letters for flag in ("-", "")}
    replaced = "".join(f" | replace({code!r}, {text!r})" for code, text in codes.items())
    macro = "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}"
    return macro + "{{ '' }}"  # or Jinja would take a line break away with which the template begins


def tokenize(texts: Sequence[str], tokenizer, *, special: bool = True) -> list[list[int]]:
    """Token ids of texts that are to be completed: nothing that a tokenizer writes behind a text (EOS) is in them.

    Args:
        texts: any number.
        tokenizer: adds its own special tokens in front.
        special: False: it adds none.
    """
    behind = len(written_behind(tokenizer)) if special else 0
    ids = tokenizer(list(texts), add_special_tokens=special).input_ids
    return [row[: len(row) - behind] for row in ids]


def written_behind(tokenizer) -> list[int]:
    """The special tokens that a tokenizer adds behind every text, such as EOS (`add_eos_token`); mostly none."""
    for text in ("1", "a"):
        plain, whole = (tokenizer([text], add_special_tokens=added).input_ids[0] for added in (False, True))
        for start in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[start : start + len(plain)] == plain:
                return whole[start + len(plain) :]
    return []


def encode_prompts(problems: Sequence[Problem], tokenizer, *, chat: bool, max_prompt_tokens: int) -> list[np.ndarray]:
    """Tokenize prompts, and refuse those that are empty or too long.

    Args:
        problems: any number.
        tokenizer: it adds its special tokens, except under `chat`, where the template has written them.
        chat: render through the chat template.
        max_prompt_tokens: a longer prompt is an error; nothing is cut in silence.

    Returns:
        One int32 array per problem.

    Raises:
        ValueError: a prompt is too long or has no token, or `chat` needs a template that is not there, raises or draws
            at random.
    """
    encoded = encode_all(problems, tokenizer, chat)
    refuse_lengths(encoded, max_prompt_tokens)
    return encoded


def refuse_lengths(prompt_ids: Sequence[Sequence[int]], max_prompt_tokens: int, advice: str = "") -> None:
    """Raise ValueError for prompts that have no token or more than `max_prompt_tokens`; `advice` ends its sentence."""
    lengths = [len(row) for row in prompt_ids]
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


def encode_all(problems: Sequence[Problem], tokenizer, chat: bool) -> list[np.ndarray]:
    """Tokenize prompts of any length.

    Raises:
        ValueError: `chat` needs a template that is not there, raises or draws at random.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("chat: True needs a tokenizer with a chat template, and this model's has none")
    if chat and DRAWS.search(str(tokenizer.chat_template)):
        raise ValueError("chat: the tokenizer's template draws at random, so no seed would give the same prompts again")
    texts = [render(problem, tokenizer, chat) for problem in problems]
    encoded: list[np.ndarray] = []
    for start in range(0, len(texts), 1024):
        ids = tokenize(texts[start : start + 1024], tokenizer, special=not chat)
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


def choose_training(problems: list[Problem], prompt_ids: Sequence, config: Config) -> tuple[list[Problem], Sequence]:
    """The problems to train on and the tokens of their prompts; says how many `skip_long_prompts` leaves out.

    Raises:
        ValueError: a prompt is too long or has no token and may not be left out, or none is left.
    """
    limit = config.max_prompt_tokens
    if not config.skip_long_prompts:
        advice = "; or leave them out of training with --skip_long_prompts True"
        refuse_lengths(prompt_ids, limit, advice)
        return problems, prompt_ids
    kept, encoded = skip_long(problems, prompt_ids, limit)
    left_out = len(problems) - len(kept)
    if left_out and distributed.is_main():
        said = f"skip_long_prompts: {left_out} of {len(problems)} training prompts are left out"
        print(f"{said} (no token, or more than max_prompt_tokens, {limit})", file=sys.stderr, flush=True)
    return kept, encoded


def stop_strings(problems: Sequence[Problem], chat: bool = False) -> list[str]:
    """The stop strings that come with the prompt format, sorted.

    Args:
        problems: any number.
        chat: whether prompts go through a chat template. Else `stop_plain`, where there is one, stands for `stop`.

    Raises:
        ValueError: problems have different stop strings. The sampler cuts all completions by the same ones.
    """
    infos = [problem.info for problem in problems]
    given = [info.get("stop", []) if chat else info.get("stop_plain", info.get("stop", [])) for info in infos]
    found = {tuple(sorted({stop} if isinstance(stop, str) else set(stop))) for stop in given}
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
