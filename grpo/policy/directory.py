"""What is no model although somebody passed it as one: each is refused in a sentence that says what to do.

Only files' names and the config are looked at. Left out: whether the weights fit (`load.py`).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from grpo.policy.tokens import special_tokens

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json", "*.bpe")
WEIGHT_FILES = ("*.safetensors", "*.bin")
POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has not fetched."""
QUANTIZED = (".weight_scale", ".weight_scale_inv", ".qweight", ".qzeros", ".SCB", ".absmax", ".weight_packed")
"""How the names of tensors end that quantization adds to a checkpoint."""


def refuse_no_model(path: str, source: str) -> None:
    """Raise ValueError if `source` is a local file or directory that is no complete model; a hub name passes.

    Args:
        path: what the user wrote, for the message.
        source: where it lies.
    """
    place = Path(source)
    if place.is_file():
        raise ValueError(f"model: {path!r} is a file: must be the directory that holds it, config and tokenizer")
    if place.is_dir() and (sentence := _what_lacks(place)):
        raise ValueError(f"model: {path!r} {sentence}")


def _what_lacks(place: Path) -> str:
    """Why a directory is no model, as the end of a sentence; empty: nothing is seen."""
    if not (place / "config.json").exists():
        return _what_else(place)
    if not any(list(place.glob(name)) for name in TOKENIZER_FILES):
        return "has no tokenizer files (tokenizer.json); save the tokenizer of its base model beside the weights"
    if not any(list(place.glob(name)) for name in WEIGHT_FILES):
        return "has no weights (model.safetensors)"
    for file in sorted(path for path in place.iterdir() if path.is_file()):
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                return f"holds a pointer of Git LFS in place of {file.name}; git lfs pull gets the file itself"
    for file in (place / "generation_config.json", *sorted(place.glob("*.index.json"))):
        if file.exists() and not _is_object(file):
            return f"has a damaged {file.name}: it must be a JSON object"
    for index in place.glob("*.index.json"):
        weight_map = json.loads(index.read_text()).get("weight_map")
        if not isinstance(weight_map, dict):
            return f"has a damaged {index.name}: its weight_map must be an object"
        parts = sorted(set(map(str, weight_map.values())))
        missing = [part for part in parts if not (place / part).exists()]
        if missing:
            return f"lacks {len(missing)} of the {len(parts)} files that {index.name} names, such as {missing[0]}"
    return ""


def _is_object(file: Path) -> bool:
    """Whether a file holds a JSON object."""
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def _what_else(place: Path) -> str:
    """What a directory without config.json is."""
    run = next((up for up in (place, *place.parents[:2]) if _is_run(up)), None)
    if run is not None:
        final = run / "final"
        known = f"use {final}" if final.is_dir() else f"{final}, its model, is written after the last step"
        return f"belongs to a run and is no model; {known}"
    if below := sorted(file.parent.name for file in place.glob("*/config.json")):
        return f"has no config.json, but its {below[0]}/ has one; use {place / below[0]}"
    return "is no model: it can not be loaded without a config.json"


def _is_run(place: Path) -> bool:
    made = ("final", "checkpoints", "metrics.jsonl", "environment.json")
    return (place / "config.yaml").exists() and any((place / name).exists() for name in made)


def refuse_quantized(path: str, config: PretrainedConfig, unknown: Iterable[str] = ()) -> None:
    """Raise ValueError if a checkpoint is quantized.

    Args:
        path: what the user wrote, for the message.
        config: the model's.
        unknown: names of tensors that the model did not take.
    """
    places = (config, config.get_text_config())
    names = ("quantization_config", "compression_config")
    said = next((x for place in places for name in names if (x := getattr(place, name, None))), None)
    scales = sorted(name for name in unknown if name.endswith(QUANTIZED))
    if said is None and not scales:
        return
    said = said if isinstance(said, dict) or said is None else said.to_dict()
    how = said.get("quant_method") or "unnamed method" if said else f"it holds {scales[0]}"
    raise ValueError(
        f"model: {path!r} is quantized ({how}): quantization is not supported; use the checkpoint it was made from"
    )


def refuse_empty_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if a tokenizer has special tokens and no others: what is made where its files are missing."""
    if not tokenizer.get_vocab().keys() - special_tokens(tokenizer).keys():
        raise ValueError(f"model: {path!r} has an empty tokenizer: its files (tokenizer.json) are missing or empty")
