"""A row's text, and stop strings, matched exactly on it, wherever in the tokens they begin.

Special tokens are a part of the text, but for EOS and padding: tags such as <think> are there for rewards to see, and a
stop string may be one, such as <|im_end|>. Left out: EOS, which is a token (`generate.py`).
"""

import bisect
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from grpo.policy import num_ids


class StopStrings:
    """Finds the first token that completes a stop string in a row's text, and cuts the text there.

    Decoding the whole row at every token would be exact but slow. A token can complete a string only if its own text
    contains the string's last character. So the row is decoded only at such tokens. If this last character is not ASCII
    (it may take several tokens) or is white space (it may vanish from a token's own text), every token is checked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str | Sequence[str], eos_ids: Iterable[int] = ()):
        """Mark the tokens that may complete one of the strings.

        Args:
            tokenizer: of the rows.
            stop: one string or several, none empty.
            eos_ids: tokens that end a row, beside the tokenizer's own EOS; no part of the text, as padding.

        Raises:
            ValueError: a string is empty, or is the padding, which is no part of the text.
        """
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(string, str) for string in stop):
            raise ValueError(f"stop: {list(stop)!r} must be one string or a list of strings")
        if any(not string for string in stop):
            raise ValueError(f"stop: {list(stop)!r} holds an empty string, which would end every completion at once")
        self.tokenizer, self.stop, V = tokenizer, tuple(stop), num_ids(tokenizer)
        ends, pad = {*eos_ids, tokenizer.eos_token_id}, tokenizer.pad_token_id
        self.hidden = {*ends, pad} - {None}
        """Ids that are no part of the text."""
        if pad is not None and pad not in ends and any(tokenizer.pad_token in string for string in stop):
            raise ValueError(f"stop: {list(stop)!r} holds the padding token {tokenizer.pad_token!r}, which no text has")
        self.may_complete = torch.zeros(V, dtype=torch.bool)
        last = {string[-1] for string in stop}
        if any(not c.isascii() or c.isspace() for c in last):
            self.may_complete[:] = True
        elif last:
            texts = tokenizer.batch_decode([[i] for i in range(V)], clean_up_tokenization_spaces=False)
            self.may_complete[:] = torch.tensor([not last.isdisjoint(text) for text in texts])

    def text(self, ids: list[int]) -> str:
        """The row's text without EOS and padding; other special tokens stay, and nothing is cleaned up."""
        shown = [i for i in ids if i not in self.hidden]
        plain = {"clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}
        return self.tokenizer.decode(shown, skip_special_tokens=False, **plain)

    def find(self, text: str) -> int:
        """Where the first stop string begins in the text; -1 if there is none."""
        return min((at for string in self.stop if (at := text.find(string)) >= 0), default=-1)

    def tokens_to_stop(self, ids: list[int]) -> int | None:
        """How many tokens the row has up to and with the one that completes a stop string; None if none does."""
        if not self.stop or self.find(self.text(ids)) < 0:
            return None
        return bisect.bisect_left(range(len(ids)), True, key=lambda n: self.find(self.text(ids[: n + 1])) >= 0) + 1

    def cut(self, ids: list[int]) -> str:
        """The row's text before its first stop string."""
        text = self.text(ids)
        at = self.find(text)
        return text if at < 0 else text[:at]
