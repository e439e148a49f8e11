"""Write a policy as a Hugging Face directory: weights, config, generation config and tokenizer; or its adapters.

Left out: how the decoder's weights become files (`weights.py`); checkpoints of a run (`run/checkpoint.py`).
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo import distributed
from grpo.files import give_usual_mode, write_whole
from grpo.policy import adapter_files, weights
from grpo.policy.decoder import CausalLM
from grpo.policy.load import base_and_adapters, model_directory, one_sentence
from grpo.policy.lora import adapted, merged
from grpo.policy.model import Policy

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Numbers of a generation config that make it invalid where `do_sample` is not set."""
KEPT = frozenset(("eos_token_id", "bos_token_id", "pad_token_id", "_from_model_config", "transformers_version"))
"""What is left of a generation config that can not be saved otherwise."""


def prepare_saving(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, path: str, revision: str | None = None, *, dtype: str = "base"
) -> torch.dtype:
    """Save everything but the weights on trial, so that what can not be saved shows before a run and not at its end.

    A generation config that can not be saved loses its sampling numbers; nothing here samples with them.

    Args:
        policy, tokenizer: as `load_policy` gave them.
        path, revision: where they come from.
        dtype: `float32`, as it was learned (float64 under fp64), or `base`, where the base's config has half of that.

    Returns:
        the dtype for `save_model`.

    Raises:
        ValueError: config or tokenizer can not be saved.
    """
    with one_sentence(path, "can not be saved, so that training it would be lost"):
        with tempfile.TemporaryDirectory() as place:
            _keep_savable(policy.model.generation_config, place)
            _save_all_but_weights(policy.model, tokenizer, place)
        path, revision, _ = base_and_adapters(path, revision)
        config = AutoConfig.from_pretrained(model_directory(path), revision=revision)
        base = config.dtype or config.get_text_config().dtype
    return base if dtype == "base" and base in (torch.bfloat16, torch.float16) else policy.dtype


def _keep_savable(config: GenerationConfig, place: str) -> None:
    """Take out of a generation config what transformers refuses to write, such as a temperature without sampling."""
    plain = GenerationConfig()
    for names in ((), SAMPLING, vars(plain).keys() - KEPT):
        for name in names:
            setattr(config, name, getattr(plain, name, None))
        try:
            return config.save_pretrained(place)
        except ValueError:
            continue


def _save_all_but_weights(model: CausalLM | PreTrainedModel, tokenizer, place: str | Path) -> None:
    """Write config, generation config and tokenizer."""
    model.config.save_pretrained(place)
    model.generation_config.save_pretrained(place)
    tokenizer.save_pretrained(place)


def save_model(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, directory: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write a Hugging Face directory (safetensors, configs, tokenizer), whole or not at all; replaces an older one.

    A collective call: rank 0 writes. Adapters are merged into the weights. Shards are gathered weight by weight.

    Args:
        dtype: of the weights in the files; None: as they are.

    Raises:
        OSError: the disk is full or not writable; the message is one sentence.
    """
    dtype, model = dtype or policy.dtype, policy.model

    def write(named: Iterator[tuple[str, Tensor]]) -> None:
        with _whole(Path(directory)) as place:
            _save_all_but_weights(model, tokenizer, place)
            if policy.is_decoder:
                weights.write(named, place, joint=model.model.spec.joint)
            else:
                model.save_pretrained(place, state_dict=_in_dtype(model, dtype), max_shard_size=weights.SHARD)
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            write_whole(place / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")

    named = merged(model) if policy.is_decoder else ()
    distributed.hand_to_main(((name, distributed.whole(weight, dtype, host=True)) for name, weight in named), write)


def save_adapters(policy: Policy, directory: str | Path, path: str, revision: str | None = None) -> None:
    """Write the adapters of a policy as peft does, whole or not at all; nothing if it has none. A collective call.

    Args:
        path, revision: what the policy was loaded from, which the files name as the base model.

    Raises:
        OSError: as `save_model`.
    """

    def write(factors: Iterator[Tensor]) -> None:
        with _whole(Path(directory)) as place:
            adapter_files.write(policy.model, factors, place, model_directory(path), revision)

    if found := adapted(policy.model):
        factors = (p for layer in found.values() for p in layer.adapter.parameters())
        distributed.hand_to_main((distributed.whole(p, host=True) for p in factors), write)


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A temporary directory to write into, which takes the place of `directory` at the end; raises as `save_model`."""
    temporary = directory.with_name(directory.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        give_usual_mode(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except Exception as error:  # on a full disk safetensors and tokenizers raise types of their own
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise OSError(f"cannot write {directory} ({reason})") from error


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's state; weights that are tied stay one tensor, which is written once."""
    made: dict[tuple, torch.Tensor] = {}
    state, adapters = {}, adapted(model)
    whole = model.state_dict() | {name: weight for name, weight in merged(model) if adapters}
    for name, weight in whole.items():
        if ".adapter." in name and name.partition(".adapter.")[0] in adapters:
            continue
        key = (weight.data_ptr(), weight.shape, weight.stride())
        if key not in made or weight.numel() == 0:
            made[key] = weight.to(dtype) if weight.is_floating_point() else weight
        state[name] = made[key]
    return state
