"""Load a policy and its tokenizer, from the hub or a directory; save them; sizes of a model without its weights.

What is loaded is compared with its own plain forward, and refused if the two differ. Left out: adapters, quantization,
sharded weights.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from grpo.files import give_usual_mode, write_whole
from grpo.logprobs import linear_logprobs
from grpo.policy.attention import TreeAttention
from grpo.policy.float64 import keep_float64
from grpo.policy.model import Policy, refuse_unsupported
from grpo.tree import pack

EMBEDDED = Path(__file__).parent.parent / "base_model"
"""Where the model named `embedded` lies: about a million parameters, made by `python -m grpo.pretrain`."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Numbers of a generation config that make it invalid where `do_sample` is not set."""
KEPT = frozenset(("eos_token_id", "bos_token_id", "pad_token_id", "_from_model_config", "transformers_version"))
"""What is left of a generation config that can not be saved otherwise."""


def load_policy(
    path: str,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    activation_checkpointing: bool = False,
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Load a policy and its tokenizer.

    Args:
        path: a hub name, a local directory, or `embedded`.
        revision: branch, tag or commit on the hub.
        device: where to put it.
        precision: `fp32`, `bf16`, `fp16` or `fp64`; the weights are float32 (float64 under fp64) whatever the file's.
        activation_checkpointing: compute each layer's activations again in backward instead of keeping them.

    Returns:
        The policy, in train mode with every dropout 0, and its tokenizer.

    Raises:
        ValueError: it can not be found or read, or it needs what is not supported.
    """
    transformers_logging.disable_progress_bar()
    source, options = model_directory(path), {"revision": revision}
    dtype = torch.float64 if precision == "fp64" else torch.float32
    with _one_sentence(path):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):  # transformers has drawn these at random
        kind = type(model).__name__
        raise ValueError(f"model: {path!r} lacks {len(missing)} weights of a {kind}, such as {missing[0]}")
    if precision == "fp64":
        keep_float64(model)
    policy = Policy(model, tokenizer, precision).train()
    refuse_if_different(policy)
    if activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
    return policy.to(device), tokenizer


def load_shapes(path: str, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on the meta device, sizes without a weight, and its real tokenizer: for looking, not for running.

    Raises:
        ValueError: it can not be found or read, or it needs what is not supported.
    """
    source = model_directory(path)
    with _one_sentence(path), torch.device("meta"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, revision=revision))
    refuse_unsupported(model, tokenizer)
    return model, tokenizer


@contextmanager
def _one_sentence(path: str, what: str = "can not be loaded, as a directory or from the hub") -> Iterator[None]:
    """Turn what transformers raises when it reads or writes a model into one sentence that names the option."""
    try:
        yield
    except Exception as error:  # files that do not fit together raise whatever their reader runs into
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"model: {path!r} {what}: {reason}") from None


def model_directory(path: str) -> str:
    """The directory or hub name behind the name in a config."""
    return str(EMBEDDED) if path == "embedded" else path


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
    model = policy.model
    with _one_sentence(path, "can not be saved, so that training it would be lost"):
        with tempfile.TemporaryDirectory() as place:
            _keep_savable(model, place)
            model.save_pretrained(place, state_dict={})
            tokenizer.save_pretrained(place)
        config = AutoConfig.from_pretrained(model_directory(path), revision=revision)
        base = config.dtype or config.get_text_config().dtype
    return base if dtype == "base" and base in (torch.bfloat16, torch.float16) else model.dtype


def _keep_savable(model: PreTrainedModel, place: str) -> None:
    """Take out of the generation config what transformers refuses to write, such as a temperature without sampling."""
    plain = GenerationConfig()
    for names in ((), SAMPLING, vars(plain).keys() - KEPT):
        for name in names:
            setattr(model.generation_config, name, getattr(plain, name, None))
        try:
            return model.generation_config.save_pretrained(place)
        except ValueError:
            continue


def save_model(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a Hugging Face directory (safetensors, configs, tokenizer), whole or not at all; replaces an older one.

    Args:
        dtype: of the weights in the files; None: as they are.

    Raises:
        OSError: one sentence, when the disk is full or not writable.
    """
    dtype = dtype or policy.model.dtype
    temporary = directory.with_name(directory.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        policy.model.save_pretrained(temporary, state_dict=_in_dtype(policy.model, dtype))
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_whole(temporary / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        tokenizer.save_pretrained(temporary)
        give_usual_mode(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except Exception as error:  # for a full disk safetensors raises its own, and tokenizers a bare Exception
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise OSError(f"cannot write {directory} ({reason})") from error


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's state; weights that are tied stay one tensor, which is written once."""
    made: dict[tuple, torch.Tensor] = {}
    state = {}
    for name, weight in model.state_dict().items():
        key = (weight.data_ptr(), weight.shape, weight.stride())
        if key not in made or weight.numel() == 0:
            made[key] = weight.to(dtype) if weight.is_floating_point() else weight
        state[name] = made[key]
    return state


@torch.no_grad()
def refuse_if_different(policy: Policy) -> None:
    """Compare tree attention and head with the model's own forward on a small tree; ValueError if they differ."""
    tokens = torch.randint(policy.vocab_size, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt, completions = tokens[:4], [tokens[4:7], tokens[7:]]
    tree = pack([prompt], [completions])
    with torch.autocast("cpu", enabled=False):
        attention = TreeAttention(tree.position_ids, tree.subtree_end, policy.heads.per_key)
        hidden = policy.hidden_states(tree.input_ids, tree.position_ids, attention)
        ours, _ = linear_logprobs(hidden[tree.source], policy.model.get_output_embeddings().weight, tree.target)
        plain = []
        for completion in completions:
            ids = torch.tensor([prompt + completion])
            logprobs = torch.log_softmax(policy.model(input_ids=ids, use_cache=False).logits[0].to(ours.dtype), -1)
            plain.append(logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0])
    gap = float((ours - torch.cat(plain)).abs().max())
    if not gap < 1e-3:
        raise ValueError(
            f"model: {type(policy.model).__name__} computes something that tree attention does not support: "
            f"log-probabilities differ from its own forward by {gap:.2g} nats"
        )
