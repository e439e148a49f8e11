"""Checks of tokenizer, chat template and configs: what ends a completion, and what prompts and texts hold.

Each is `(config, facts) -> Iterator[Finding]`, listed in `TOKEN_CHECKS` and run by `diagnose.py`. Left out: what is
refused when a model is loaded (`policy/`).
"""

from collections.abc import Iterator

from grpo.config import Config
from grpo.doctor.facts import Facts, Finding


def ends(c: Config, facts: Facts) -> Iterator[Finding]:
    """Tokens that end a text and no completion."""
    t = facts.tokens
    known = f"EOS is {' or '.join(t.eos)}" if t.eos else "There is no EOS"
    if t.lost_eos:
        yield Finding(
            "warning",
            f"EOS {', '.join(map(str, t.lost_eos))} of a config has no token in the tokenizer",
            f"What has no token is never sampled, so it ends no completion. {known}.",
            "Mend `eos_token_id` in config.json or generation_config.json, or take the tokenizer of this model.",
        )
    if not t.eos:
        yield Finding(
            "warning" if facts.stop else "sure",
            "neither tokenizer nor config has an EOS",
            "Only a stop string ends a completion." if facts.stop else "Every completion runs to max_new_tokens.",
            "Set `eos_token_id` in the model's generation_config.json.",
        )
    if t.turn_end:
        id_known = f" (id {t.turn_end_ids[0]})" if t.turn_end_ids else ""
        remedy = f"the data `stop`: [{t.turn_end!r}]"
        yield Finding(
            "warning",
            f"the chat template ends a turn with {t.turn_end!r}, which is no EOS",
            f"A completion does not end there and runs on to max_new_tokens. {known}.",
            f"Add it{id_known} to `eos_token_id` in the model's generation_config.json, or give {remedy}."
            if t.turn_end_ids
            else f"Give {remedy}.",
        )
    if t.unwritten_stops:
        yield Finding(
            "warning",
            f"the tokenizer does not give the stop string {t.unwritten_stops[0]!r} back when it has encoded it",
            "It may never stand in a completion, and then ends none.",
            "Another `stop`, as the tokenizer decodes it.",
        )


def prompts(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompts that end a text, and parts of problems that are in no prompt."""
    t = facts.tokens
    if t.ending_in_eos:
        yield Finding(
            "warning",
            f"{t.ending_in_eos} of {len(facts.prompt_tokens)} training prompts end with EOS ({' or '.join(t.eos)})",
            "The model has been told that the text is over: a completion begins another one.",
            "Take it off the prompts, or off the end of the chat template.",
        )
    if t.behind:
        yield Finding(
            "note",
            f"the tokenizer writes {t.behind!r} behind every text",
            "It is taken off prompts, which are to be completed.",
            "Nothing; where the model is used, its prompts must not end with it either.",
        )
    if t.systems and not c.chat:
        yield Finding(
            "warning",
            f"{t.systems} training problems have a system prompt, and chat is False",
            "Without a chat template the prompt is used as written: the model never sees `system`.",
            "chat True, or write it into the prompts.",
        )
    if t.reads_clock:
        yield Finding(
            "note",
            "the chat template asks for the date",
            "It is told 26 July 2024 on every day, so that the same seed gives the same prompts.",
            "Nothing, unless questions are about today.",
        )


def tags(c: Config, facts: Facts) -> Iterator[Finding]:
    """Special tokens that a reward may look for."""
    if found := facts.tokens.tags:
        shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
        yield Finding(
            "note",
            f"special tokens look like tags: {shown}",
            "Rewards, graders and transcripts see them: of special tokens only EOS and padding are left out of texts.",
            "Nothing; a reward may look for them.",
        )


TOKEN_CHECKS = (ends, prompts, tags)
