"""Finds stop strings in the decoded text of a row, exactly, even if one begins inside a token.

Left out: EOS, which is a token and not a string (`generate.py`).
"""

import bisect
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Finds the first token that completes a stop string in a row's text, and cuts the text there.

    Decoding the whole row at every token would be exact but slow. A token can complete a string only if its own text
    contains the string's last character. So the row is decoded only at such tokens. If this last character is not ASCII
    (it may take several tokens) or is white space (it may vanish from a token's own text), every token is checked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]):
        """Mark the tokens that may complete one of the strings.

        Raises:
            ValueError: a string is empty.
        """
        if any(not string for string in stop):
            raise ValueError(f"stop: {list(stop)!r} holds an empty string, which would end every completion at once")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.may_complete = torch.zeros(len(tokenizer), dtype=torch.bool)
        last = {string[-1] for string in stop}
        if any(not c.isascii() or c.isspace() for c in last):
            self.may_complete[:] = True
        elif last:
            texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
            self.may_complete[:] = torch.tensor([not last.isdisjoint(text) for text in texts])

    def text(self, ids: list[int]) -> str:
        """The row's text without special tokens, and without the tokenizer's clean-up of spaces."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

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
