"""Write models with random weights as Hugging Face directories, so that all contestants use the same one.

Speed does not depend on trained weights. Left out: measuring.
"""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo.policy import model_directory


def make(model: str, directory: str, tokenizer: str | None = None, changes: dict | None = None, seed: int = 0) -> dict:
    """Write a model with the architecture of `model` and random weights.

    Args:
        model: `embedded`, or a directory (or hub name) with config.json.
        directory: where to write it; created if missing.
        tokenizer: directory of the tokenizer; None: that of the model. Tokens that occur in no text are added until it
            has as many as the model's vocabulary, so that the head has its full size.
        changes: changes to the config, such as {"vocab_size": 32768}.
        seed: of the weights.

    Returns:
        {"parameters": their number}.

    Raises:
        ValueError: model or tokenizer cannot be read, or the tokenizer has too many tokens or cannot be extended.
    """
    try:
        config = AutoConfig.from_pretrained(model_directory(model))
        words = AutoTokenizer.from_pretrained(model_directory(tokenizer or model))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"model: {model!r} with tokenizer {tokenizer!r} can not be loaded: {reason}") from None
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    if changes and "num_hidden_layers" in changes and getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * config.num_hidden_layers
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(directory)
    words.save_pretrained(directory)
    _fill(Path(directory) / "tokenizer.json", config.vocab_size)
    size = len(AutoTokenizer.from_pretrained(directory))
    assert size == config.vocab_size, f"the filled tokenizer has {size} tokens, not {config.vocab_size}"
    return {"parameters": sum(parameter.numel() for parameter in made.parameters())}


def _fill(file: Path, size: int) -> None:
    """Add tokens to a tokenizer's file until it has `size`. No merge produces them, so they occur in no text."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        kind = content["model"].get("type")
        raise ValueError(f"tokenizer: {kind} cannot be extended, only BPE and WordLevel can")
    taken = {*vocabulary.values(), *(token["id"] for token in content["added_tokens"])}
    if len(taken) > size:
        raise ValueError(f"tokenizer: has {len(taken)} tokens, more than the model's vocabulary of {size}")
    for number in sorted(set(range(size)) - taken):
        vocabulary[f"<filler {number}>"] = number
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
