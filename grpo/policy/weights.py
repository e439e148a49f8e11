"""Weights of the decoder: read from files or taken over from a model of transformers, and written.

A tensor is read, brought to its dtype and put into its place before the next one is read, so that the weights lie in
memory once. Left out: configs and tokenizers (`load.py`); adapters (`lora.py`); quantized weights.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from grpo.policy.decoder import CausalLM
from grpo.policy.spec import spec_of

SHARD = "5GB"
"""The largest file that is written."""
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
"""Names of the files of weights. With `.index.json` behind it, the name of a list of several."""
IN_A_LAYER = re.compile(r"\b(layers|h|blocks)\.\d+\.(?!.*(rotary_emb|masked_bias|attn\.bias$))")
"""Names of weights that are a part of the model; heads and buffers of other uses may stay unused."""
JOINT = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Matrices that some files hold as one (`Spec.joint`)."""


def empty_decoder(config: PretrainedConfig) -> CausalLM | None:
    """A decoder of this config on the meta device, so that it has no weights yet; None: it does not know the family.

    Its config names the class of transformers that can read what is saved, as every config on the hub does.
    """
    spec = spec_of(config)
    if spec is None:
        return None
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    with torch.device("meta"):
        return CausalLM(config, spec)


def taken_over(model: CausalLM | PreTrainedModel) -> CausalLM | PreTrainedModel:
    """A decoder over the same weights, in the same memory; the model itself, if the decoder does not know its class.

    A class of somebody else's may compute something of its own over the config and the weights of a known family.

    Raises:
        ValueError: the model has weights for which the decoder has no place.
    """
    known = type(model) is MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    ours = empty_decoder(model.config) if known else None
    if ours is None or model.device.type == "meta":
        return model
    unused = fill(ours, model.state_dict(keep_vars=True).items())
    refuse_unused(ours, unused, type(model).__name__)
    ours.generation_config = model.generation_config
    return ours.to(model.device).train(model.training)


def fill(model: CausalLM, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> list[str]:
    """Put tensors into the places of their names.

    Args:
        model: a decoder; each of its parameters is replaced.
        named: as in the files of Hugging Face.
        dtype: of the parameters, which are then copies to be trained; None: they are the tensors themselves, and what
            is frozen among these stays frozen.

    Returns:
        The names for which there is no place.

    Raises:
        ValueError: a parameter gets no tensor, or one of another shape.
    """
    places = dict(model.named_parameters(remove_duplicate=False))
    missing, unused = set(places), []
    for whole_name, whole in named:
        for name, tensor in _parts(whole_name, whole, model):
            if name not in places:
                unused.append(name)
                continue
            if tensor.shape != places[name].shape:
                shapes = list(tensor.shape), list(places[name].shape)
                raise ValueError(f"{name} has the shape {shapes[0]} in the file, and must have {shapes[1]}")
            value = tensor.detach() if dtype is None else tensor.to(dtype, copy=True)
            trained = dtype is not None or tensor.requires_grad
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=trained))
            missing.discard(name)
    if model.model.spec.tied:
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(f"it lacks {len(missing)} weights of its config, such as {min(missing)}")
    model.tie()
    return unused


def refuse_unused(model: nn.Module, unused: Iterable[str], path: str) -> None:
    """Raise ValueError if weights of a layer have no place in the model."""
    lost = sorted(name for name in unused if IN_A_LAYER.search(name))
    if lost:
        kind = (model.config.architectures or [type(model).__name__])[0]
        raise ValueError(
            f"model: {path!r} holds {len(lost)} weights for which a {kind} of its config has no place, such as "
            f"{lost[0]}; config and weights do not fit together"
        )


def _parts(name: str, tensor: Tensor, model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a tensor of a file is; their names begin with `model.` or `lm_head.`, as not in all files."""
    if not name.startswith(("model.", "lm_head.")):
        name = f"model.{name}"
    owner, _, leaf = name.rpartition(".")
    joint = next((joint for joint in JOINT if owner.endswith(joint)), None)
    if joint is None or not model.model.spec.joint:
        yield name, tensor
        return
    names = [owner.removesuffix(joint) + part for part in JOINT[joint]]
    rows = [model.get_submodule(part).out_features for part in names]
    for part, value in zip(names, tensor.split(rows), strict=True):
        yield f"{part}.{leaf}", value


def fetched(name: str, revision: str | None) -> Path:
    """The directory of a hub model's weights on this machine, which is called like the commit.

    Args:
        name: on the hub.
        revision: branch, tag or commit.
    """
    directory = Path(snapshot_download(name, revision=revision, allow_patterns=["model*.safetensors*"]))
    if not list(directory.glob("model*.safetensors")):
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=["pytorch_model*.bin*"]))
    return directory


def stored(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a directory and its name, one after another.

    Raises:
        ValueError: there are no weights.
    """
    for file in _files(directory):
        if file.suffix == ".bin":
            mapped = is_zipfile(file)  # files from before torch 1.6 are read at once
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=mapped).items()
            continue
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
        for name in names:  # opened for each: what was read of a mapped file counts as memory until it is closed
            with safe_open(file, framework="pt") as content:
                yield name, content.get_tensor(name)


def _files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights."""
    for name in (SAFE, PICKLED):
        index = directory / f"{name}.index.json"
        if (directory / name).exists():
            return [directory / name]
        if index.exists():
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [directory / part for part in sorted(parts)]
    raise ValueError(f"it has no weights ({SAFE})")


def write(named: Iterable[tuple[str, Tensor]], directory: Path, *, joint: bool) -> None:
    """Write weights as safetensors, in files of at most `SHARD`, with the names that the family's files have.

    Args:
        named: those of a decoder, in the dtype of the files.
        directory: exists.
        joint: the family's files join matrices (`JOINT`).
    """
    state = dict(named)
    if joint:
        for whole, parts in JOINT.items():
            for first in [name for name in state if name.endswith(f"{parts[0]}.weight")]:
                owner = first.removesuffix(f"{parts[0]}.weight")
                state[f"{owner}{whole}.weight"] = torch.cat([state.pop(f"{owner}{part}.weight") for part in parts])
    save_torch_state_dict(state, directory, max_shard_size=SHARD, metadata={"format": "pt"})
