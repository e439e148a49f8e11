"""The ids that a tokenizer has, and those that end a text. Left out: texts (`sampler/stops.py`), prompts.

Ids may have gaps: 257 tokens, and the highest id is 300. So the bound of a vocabulary is the highest id + 1 and not the
number of tokens, and ids below it that no token has are marked, so that nobody samples them.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """V: the highest id of a token, plus 1."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def absent_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """[V] bool: ids that no token has; None where every id has one."""
    used = set(tokenizer.get_vocab().values())
    V = max(used, default=-1) + 1
    if len(used) == V:
        return None
    absent = torch.ones(V, dtype=torch.bool)
    absent[sorted(used)] = False
    return absent


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token and its id: those with a role, such as EOS, and those that are only marked as special."""
    marked = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's, the model's and the generation config's.

    Raises:
        ValueError: a config names something else than token ids.
    """
    ids: set[int] = set()
    for source in (tokenizer, model.config, model.generation_config):
        value = getattr(source, "eos_token_id", None)
        listed = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
            where = type(source).__name__
            raise ValueError(f"model: eos_token_id is {value!r} in its {where}: must be a token id or a list of them")
        ids.update(listed)
    return sorted(i for i in ids if i >= 0)
