"""What tokenizer, chat template, config and prompts write at the end of a text, compared with what ends a completion.

Facts alone; what follows from them is in `check_tokens.py`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data.problem import Problem
from grpo.dataloader import fill_template, reads_clock, written_behind
from grpo.policy import eos_ids, special_tokens

ANSWER = "The answer of an assistant"
TAG = re.compile(r"[<\[]\|?/?(\w+)\|?[>\]]")
"""A token that looks like a tag: <think>, </think>, [THINK], <|tool_call|>."""


@dataclass(frozen=True)
class TokenFacts:
    """Where a tokenizer's tokens, its chat template and the model's configs do not go together."""

    eos: tuple[str, ...] = ("<eos>",)
    """The tokens that end a completion."""
    lost_eos: tuple[int, ...] = ()
    """Ids that a config names as EOS and that the tokenizer has no token for."""
    turn_end: str = ""
    """What the chat template writes after an answer, where neither an EOS nor a stop string is in it."""
    turn_end_ids: tuple[int, ...] = ()
    behind: str = ""
    """What the tokenizer writes behind every text; taken off prompts."""
    ending_in_eos: int = 0
    """Training prompts that end with an EOS."""
    unwritten_stops: tuple[str, ...] = ()
    """Stop strings that the tokenizer does not give back when it has encoded them."""
    tags: tuple[str, ...] = ()
    """Special tokens that look like tags."""
    reads_clock: bool = False
    """The chat template asks for the date."""
    systems: int = 0
    """Problems that come with a system prompt."""


def look_at_tokens(model, tokenizer, chat: bool, problems: Sequence[Problem], encoded, stop: Iterable[str]):
    """The `TokenFacts` of a model.

    Args:
        model: of transformers, for its configs.
        tokenizer: its tokenizer.
        chat: prompts go through the chat template.
        problems: of training.
        encoded: their prompts' tokens.
        stop: the stop strings that come with the data.
    """
    ends, known = eos_ids(model, tokenizer), set(tokenizer.get_vocab().values())
    turn_end, ids = _turn_end(tokenizer, ends, tuple(stop)) if chat else ("", ())
    return TokenFacts(
        eos=tuple(tokenizer.convert_ids_to_tokens(i) for i in ends if i in known),
        lost_eos=tuple(i for i in ends if i not in known),
        turn_end=turn_end,
        turn_end_ids=ids,
        behind="" if chat else tokenizer.decode(written_behind(tokenizer)),
        ending_in_eos=sum(int(row[-1]) in ends for row in encoded),
        unwritten_stops=tuple(string for string in stop if not _is_written(string, tokenizer)),
        tags=_tags(tokenizer),
        reads_clock=chat and reads_clock(tokenizer),
        systems=sum(problem.info.get("system") is not None for problem in problems),
    )


def _turn_end(tokenizer, ends: Sequence[int], stop: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
    """What the chat template writes after an answer, and its tokens; nothing where a completion would end with it."""
    turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = fill_template(tokenizer, turns, add_generation_prompt=False)
    except ValueError:  # a template for other turns; if it can not render the prompts either, those say so
        return "", ()
    written = text.rpartition(ANSWER)[2].strip()
    ids = tokenizer(written, add_special_tokens=False).input_ids if written else []
    if not ids or set(ids) & set(ends) or any(string in written for string in stop):
        return "", ()
    known = set(special_tokens(tokenizer).values())
    special = [i for i in ids if i in known]
    return (tokenizer.convert_ids_to_tokens(special[0]), (special[0],)) if special else (written, ())


def _is_written(string: str, tokenizer) -> bool:
    return string in tokenizer.decode(
        tokenizer(string, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False
    )


def _tags(tokenizer) -> tuple[str, ...]:
    """Special tokens that look like tags, but for those that have a role, such as EOS: pairs <x> and </x>, or words."""
    roles = {str(x) for x in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)}
    by_id = sorted(special_tokens(tokenizer).items(), key=lambda item: item[1])
    special = [token for token, _ in by_id if token not in roles and TAG.fullmatch(token)]
    closed = {token.replace("/", "") for token in special if "/" in token}
    worded = re.compile(r"think|reason|answer|solution|tool", re.IGNORECASE)
    return tuple(token for token in special if token.replace("/", "") in closed or worded.search(token))
