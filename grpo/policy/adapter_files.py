"""Directories of adapters, in the format of peft (https://github.com/huggingface/peft): read into weights, and written.

Such a directory holds `adapter_config.json` and `adapter_model.safetensors`, and names the model that it belongs to. A
model that is an adapter is that model with the adapter merged into its weights. Left out: adapters on the hub; whatever
is no plain LoRA of linear layers, which is refused.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo.policy.lora import adapted, linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""How names begin in the file, before those of the model."""
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
"""What a config says of adapters that are known here. Where one lacks a key, peft takes these too."""
BEGUN_BESIDE = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin adapters that leave the base model's weights as they are."""


def base_of(place: Path) -> tuple[str, str | None] | None:
    """The model that an adapter belongs to, a directory or hub name, and its revision; None: this is no adapter.

    Raises:
        ValueError: the config is damaged or names no model.
    """
    if not (place / CONFIG).is_file():
        return None
    config = _config(place)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base or Path(base).resolve() == place.resolve():
        raise ValueError(f"its {CONFIG} must name its base model, and base_model_name_or_path is {base!r}")
    return base, revision


def _config(place: Path) -> dict:
    """Raises ValueError if there is no plain LoRA."""
    config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"its {CONFIG} must be a JSON object")
    for key, plain in PLAIN.items():
        if (value := config.get(key, plain)) != plain and (value or plain):
            raise ValueError(f"adapters with {key} {value!r} are not supported, it must be {plain!r}")
    if (begun := config.get("init_lora_weights", True)) not in BEGUN_BESIDE:
        raise ValueError(f"adapters with init_lora_weights {begun!r} are not supported: they change the base model")
    return config


@torch.no_grad()
def merge_from(place: Path, model: nn.Module) -> None:
    """Add the adapters of a directory to a model's weights.

    Raises:
        ValueError: an adapter does not fit the model.
    """
    config, layers = _config(place), linear_layers(model)
    found = load_file(place / WEIGHTS)
    for key in sorted(key for key in found if key.endswith(".lora_A.weight")):
        other = key.replace(".lora_A.", ".lora_B.")
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = found.pop(key), found.pop(other, None)
        if name not in layers or B is None:
            raise ValueError(f"{key} has no B beside it, or no linear layer in the model")
        weight = layers[name].weight
        if (len(A), (len(B), A.shape[1])) != (config["r"], tuple(weight.shape)) or B.shape[1] != len(A):
            shapes = f"{list(A.shape)} and {list(B.shape)}"
            raise ValueError(f"{name} has factors {shapes}, of rank {config['r']} for a weight {list(weight.shape)}")
        weight += (B.to(weight) * (config["lora_alpha"] / config["r"])) @ A.to(weight)
    if found:
        raise ValueError(f"its {WEIGHTS} holds {min(found)}, which is no adapter of a linear layer")


def write(model: nn.Module, factors: Iterable[Tensor], directory: Path, base: str, revision: str | None) -> None:
    """Write a model's adapters.

    Args:
        model: with adapters.
        factors: their A and B, layer by layer, as they are to be written.
        directory: exists.
        base: the model without them, a directory or hub name.
        revision: of a hub model.
    """
    layers = adapted(model)
    one = next(iter(layers.values())).adapter
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "revision": revision,
        "r": len(one.A),
        "lora_alpha": int(one.alpha) if one.alpha == int(one.alpha) else one.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "inference_mode": True,
    }
    names = [f"{PREFIX}{name}.lora_{x}.weight" for name, layer in layers.items()
             for x, _ in layer.adapter.named_parameters()]  # fmt: skip
    found = {name: factor.contiguous() for name, factor in zip(names, factors, strict=True)}
    save_file(found, directory / WEIGHTS, {"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
