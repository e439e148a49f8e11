"""Tiny random models, their plain twins and a byte tokenizer, for tests: no download, a few thousand weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo.policy import Policy

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
"""Families of the decoder that stand for all others where many tests would be slow."""


class Sizes(TorchDispatchMode):
    """Within it, the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        several = isinstance(result, tuple | list)
        self.shapes += [x.shape for x in (result if several else (result,)) if torch.is_tensor(x)]
        return result

    @property
    def largest(self) -> int:
        """Elements of the largest one."""
        return max(shape.numel() for shape in self.shapes)


def byte_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per byte (0..255), `<eos>` (256, also the padding), and one per word (257...): no merge makes those."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<eos>": 256}
    for word in words:
        vocab["".join(symbols for symbols, _ in pre.pre_tokenize_str(word))] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )


def tiny_model(family: str = "qwen2", vocab_size: int = 260, seed: int = 0, dtype=torch.float32, **changes):
    """A random decoder of the family: 2 layers, width 32, 4 heads over 2 key heads; weights large enough to matter."""
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": None,
        "sliding_window": None,
        "initializer_range": 0.2,
    } | changes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which start at ones and zeros
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_policy(family: str = "qwen2", precision: str = "fp32", tokenizer=None, **changes) -> Policy:
    """A policy over `tiny_model` and the byte tokenizer."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = tiny_model(family, dtype=dtype, **changes)
    return Policy(model, byte_tokenizer() if tokenizer is None else tokenizer, precision)


@contextmanager
def in_float64() -> Iterator[None]:
    """Within it, transformers computes in float64 what it casts to float32 whatever the model's dtype (norms, angles).

    Float32 would hide differences below 1e-7.
    """
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def keep_float64(model: torch.nn.Module) -> None:
    """From now on a model of transformers computes everything in float64."""
    forward = model.forward

    def in_double(*arguments, **options):
        with in_float64():
            return forward(*arguments, **options)

    model.forward = in_double


def plain_twin(policy: Policy, family: str = "qwen2", **changes):
    """The same weights in transformers' own model with its own attention (sdpa: eager rounds to float32)."""
    dtype = policy.head.dtype
    twin = tiny_model(family, dtype=dtype, attn_implementation="sdpa", **changes)
    if dtype == torch.float64:
        keep_float64(twin)
    twin.load_state_dict(policy.model.state_dict())
    return twin


def plain_logprobs(model, prompts, completions, temperature: float, vocab_size: int, width: int):
    """Row by row, full softmax: logprobs and entropy [B,width], 0 where a row has no token."""
    logprobs, entropies = [], []
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :, :vocab_size]
            log_p = torch.log_softmax(logits[: len(completion)] / temperature, dim=-1)
            picked = log_p.gather(1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]
            fill = (0, width - len(completion))
            logprobs.append(torch.nn.functional.pad(picked, fill))
            entropies.append(torch.nn.functional.pad(-(log_p.exp() * log_p).sum(-1), fill))
    return torch.stack(logprobs), torch.stack(entropies)


def save_tiny(path, family: str = "qwen2", seed: int = 0, **changes) -> str:
    """Save a tiny model and the byte tokenizer as a Hugging Face directory; returns its path."""
    tiny_model(family, seed=seed, **changes).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)
