"""Models that write a given chain of tokens, and a byte tokenizer with special tokens at given ids."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo.policy import load_policy
from grpo.sampler import Sampler

TURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""A chat template in the way of Qwen's."""


def special_tokenizer(
    specials: dict[str, int], *, template: str | None = None, behind: str = "", pad: str | None = None
):
    """Bytes are 0..255; special tokens have the ids given, `<eos>` among them is EOS.

    Args:
        specials: text -> id.
        template: of chats.
        behind: the special token that is written behind every text.
        pad: the special token that pads.
    """
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | specials
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    if behind:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {behind}", special_tokens=[(behind, specials[behind])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token=pad, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    """The text's tokens, and nothing around them."""
    return tokenizer(text, add_special_tokens=False).input_ids


def puppet(chain: Sequence[int], rows: int = 320) -> LlamaForCausalLM:
    """The next token depends on the last alone: along the chain, and from any other token to its first."""
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 16,
    }
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=rows, hidden_size=rows, max_position_embeddings=512, **sizes, **ends)
    )
    following = dict(zip(chain, chain[1:], strict=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(rows))
        for token in range(rows):
            model.lm_head.weight[following.get(token, chain[0]), token] = 8 / rows**0.5
    return model


def saved_puppet(path: Path, tokenizer, chain: Sequence[int], rows: int = 320) -> str:
    """Save a puppet and its tokenizer as a Hugging Face directory; returns its path."""
    puppet(chain, rows).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def puppet_sampler(path: Path, tokenizer, chain: Sequence[int], rows: int = 320) -> Sampler:
    """The sampler of a puppet that was saved and loaded."""
    return Sampler(*load_policy(saved_puppet(path, tokenizer, chain, rows)))


GREEDY = {"group_size": 1, "max_new_tokens": 12, "temperature": 0.0, "seed": 0, "step": 0}


def drawn(sampler: Sampler, prompt: str = "9+9=", **changes) -> tuple[list[int], str, bool]:
    """(tokens, text, whether it ended) of the greedy completion of a prompt."""
    got = sampler.generate([ids(sampler.tokenizer, prompt)], **GREEDY | changes)
    return got.completion_ids[0][got.completion_mask[0]].tolist(), got.texts[0], bool(got.finished[0])
