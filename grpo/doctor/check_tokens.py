"""Check tokenizer, chat template and configs: what ends a completion, and what prompts and texts hold.

Each check compares what is written at the end of a text with what ends a completion. Left out: what is refused when a
model is loaded (`policy/`).
"""

import re
from collections.abc import Iterator, Sequence

from data.problem import Problem
from grpo.dataloader import fill_template, written_behind
from grpo.doctor.finding import Finding
from grpo.policy import eos_ids, special_tokens

ANSWER = "The answer of an assistant"
TAG = re.compile(r"[<\[]\|?/?(\w+)\|?[>\]]")
"""A token that looks like a tag: <think>, </think>, [THINK], <|tool_call|>."""
WORD_OF_TAG = re.compile(r"think|reason|answer|solution|tool", re.IGNORECASE)


def look_at_tokens(
    model, tokenizer, chat: bool, problems: Sequence[Problem], encoded: Sequence[Sequence[int]], stop: Sequence[str]
) -> Iterator[Finding]:
    """Everything about tokens that does not go together.

    Args:
        model: of transformers, for its configs.
        tokenizer: its tokenizer.
        chat: prompts go through the chat template.
        problems: those that are looked at.
        encoded: their prompts' tokens.
        stop: the stop strings that come with the data.
    """
    known = set(tokenizer.get_vocab().values())
    ends = eos_ids(model, tokenizer)
    eos = [tokenizer.convert_ids_to_tokens(i) for i in ends if i in known]
    says = f"EOS is {' or '.join(eos)}" if eos else "There is no EOS"
    if lost := [i for i in ends if i not in known]:
        yield Finding(
            "warning",
            f"EOS {', '.join(map(str, lost))} of a config has no token in the tokenizer",
            f"What has no token is never sampled, so it ends no completion. {says}.",
            "Mend `eos_token_id` in config.json or generation_config.json, or take the tokenizer of this model.",
        )
    if not eos:
        yield Finding(
            "warning" if stop else "sure",
            "neither tokenizer nor config has an EOS",
            "Only a stop string ends a completion." if stop else "Every completion runs to max_new_tokens.",
            "Set `eos_token_id` in the model's generation_config.json.",
        )
    if chat:
        yield from _turn_end(tokenizer, ends, stop, says)
    else:
        yield from _plain_text(tokenizer, stop)
    yield from _stop_strings(tokenizer, stop)
    yield from _prompts(tokenizer, chat, problems, sum(int(row[-1]) in ends for row in encoded), eos)
    yield from _tags(tokenizer)


def _turn_end(tokenizer, ends: Sequence[int], stop: Sequence[str], says: str) -> Iterator[Finding]:
    """A chat template that ends a turn with something that ends no completion."""
    turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = fill_template(tokenizer, turns, add_generation_prompt=False)
    except ValueError:  # a template for other turns; if it can not render the prompts either, those say so
        return
    written = text.rpartition(ANSWER)[2].strip()
    ids = tokenizer(written, add_special_tokens=False).input_ids if written else []
    if not ids or set(ids) & set(ends) or any(string in written for string in stop):
        return
    known = set(special_tokens(tokenizer).values())
    special = [i for i in ids if i in known]
    if special:
        written = tokenizer.convert_ids_to_tokens(special[0])
    remedy = f"the data `stop`: [{written!r}]"
    mend = f"Give {remedy}."
    if special:
        mend = f"Add it (id {special[0]}) to `eos_token_id` in the model's generation_config.json, or give {remedy}."
    yield Finding(
        "warning",
        f"the chat template ends a turn with {written!r}, which is no EOS",
        f"A completion does not end there and runs on to max_new_tokens. {says}.",
        mend,
    )


def _plain_text(tokenizer, stop: Sequence[str]) -> Iterator[Finding]:
    """Plain-text prompts whose completions only EOS can end, or that a chat model was not tuned on."""
    if not stop:
        yield Finding(
            "warning",
            "completion prompts without a stop string",
            "A base model answers and then writes the next question. Most completions are cut at max_new_tokens, and "
            "their last lines answer something else. A gain may then come from learning to stop alone.",
            'Give the data a column `stop`, with a list such as ["\\n\\nQuestion:"]. For a chat model use --chat True.',
        )
    if tokenizer.chat_template:
        yield Finding(
            "note",
            "the tokenizer has a chat template, and prompts are plain text",
            "This is right for a base model. An Instruct model was tuned on another form of prompt.",
            "For an Instruct model: --chat True.",
        )


def _stop_strings(tokenizer, stop: Sequence[str]) -> Iterator[Finding]:
    """Stop strings that the tokenizer does not give back when it has encoded them."""
    for string in stop:
        ids = tokenizer(string, add_special_tokens=False).input_ids
        if string not in tokenizer.decode(ids, clean_up_tokenization_spaces=False):
            yield Finding(
                "warning",
                f"the tokenizer does not give the stop string {string!r} back when it has encoded it",
                "It may never stand in a completion, and then ends none.",
                "Another `stop`, as the tokenizer decodes it.",
            )


def _prompts(tokenizer, chat: bool, problems: Sequence[Problem], ending: int, eos: list[str]) -> Iterator[Finding]:
    """Prompts that end with one of `eos` (`ending` of them), and system prompts that are in no prompt."""
    if ending:
        yield Finding(
            "warning",
            f"{ending} of {len(problems)} training prompts end with EOS ({' or '.join(eos)})",
            "The model has been told that the text is over: a completion begins another one.",
            "Take it off the prompts, or off the end of the chat template.",
        )
    behind = "" if chat else tokenizer.decode(written_behind(tokenizer))
    if behind:
        yield Finding(
            "note",
            f"the tokenizer writes {behind!r} behind every text",
            "It is taken off prompts, which are to be completed.",
            "Nothing; where the model is used, its prompts must not end with it either.",
        )
    systems = sum(str(problem.info.get("system") or "") not in problem.prompt for problem in problems)
    if systems and not chat:
        yield Finding(
            "warning",
            f"{systems} training problems have a system prompt, and chat is False",
            "Without a chat template the prompt is used as written: the model never sees `system`.",
            "chat True, or write it into the prompts.",
        )


def _tags(tokenizer) -> Iterator[Finding]:
    """Special tokens that look like tags, but for those that have a role, such as EOS: pairs <x> and </x>, or words."""
    roles = {str(x) for x in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)}
    by_id = sorted(special_tokens(tokenizer).items(), key=lambda item: item[1])
    special = [token for token, _ in by_id if token not in roles and TAG.fullmatch(token)]
    closed = {token.replace("/", "") for token in special if "/" in token}
    tags = [token for token in special if token.replace("/", "") in closed or WORD_OF_TAG.search(token)]
    if tags:
        shown = ", ".join(tags[:6]) + (", ..." if len(tags) > 6 else "")
        yield Finding(
            "note",
            f"special tokens look like tags: {shown}",
            "Rewards, graders and transcripts see them: of special tokens only EOS and padding are left out of texts.",
            "Nothing; a reward may look for them.",
        )
