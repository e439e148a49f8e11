"""Load a policy and its tokenizer from the hub or a directory, or read only a model's sizes.

A directory of an adapter stands for its base model with the adapter merged into it (`adapter_files.py`). Left out:
saving (`save.py`), what is no model (`directory.py`), what a model can not be used for (`limits.py`).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from grpo import distributed
from grpo.logprobs import linear_logprobs
from grpo.policy import adapter_files, weights
from grpo.policy.attention import PrefillAttention, TreeAttention
from grpo.policy.decoder import CausalLM
from grpo.policy.directory import refuse_empty_tokenizer, refuse_no_model, refuse_quantized
from grpo.policy.limits import refuse_unsupported
from grpo.policy.model import Policy, refuse_precision
from grpo.policy.spec import FAMILIES
from grpo.tree import pack

EMBEDDED = Path(__file__).parent.parent / "base_model"
"""Directory of the model named `embedded`: about a million parameters, made by `python -m grpo.pretrain`."""
SHIPPED = {"embedded": EMBEDDED, "embedded_programs": EMBEDDED.with_name("base_model_programs")}
"""{special name: directory} of the models in this repository, one for each demo."""
MOST_ADAPTERS = 10
"""The most adapters that are merged one upon another; more of them name each other in a circle."""


def load_policy(
    path: str | PathLike,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    activation_checkpointing: bool = False,
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Load a policy and its tokenizer.

    Args:
        path: a hub name, a local directory of a model or an adapter, or a name of `SHIPPED`.
        revision: branch, tag or commit on the hub.
        device: where to put it.
        precision: `fp32`, `bf16`, `fp16` or `fp64`. The weights become float32 (float64 under fp64), whatever the dtype
            in the file.
        activation_checkpointing: compute each layer's activations again in backward instead of keeping them.

    Returns:
        The policy, in train mode with every dropout 0, and its tokenizer.

    Raises:
        ValueError: the model cannot be found or read, lacks weights, or needs something that is not supported.
    """
    transformers_logging.disable_progress_bar()
    refuse_precision(precision)
    if str(device) == "auto":
        raise ValueError("device is 'auto': must be cpu or cuda where a model is loaded")
    path, revision, adapters = base_and_adapters(str(path), revision)
    config, tokenizer = _read_config(path, revision)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = weights.empty_decoder(config)
    if model is None:
        policy = _load_wrapped(path, revision, tokenizer, precision, dtype)
    else:
        policy = _load_decoder(model, path, revision, tokenizer, precision, dtype)
    for place in adapters:
        with one_sentence(str(place), "can not be merged into its base model"):
            adapter_files.merge_from(place, policy.model)
    if activation_checkpointing:
        policy.checkpoint_activations()
    return policy.to(device), tokenizer


def base_and_adapters(path: str, revision: str | None) -> tuple[str, str | None, list[Path]]:
    """Path and revision of the model without adapters, and the directories of adapters to merge into it, in order.

    An adapter may belong to a model that is itself an adapter.

    Raises:
        ValueError: an adapter is not supported, or names no model.
    """
    adapters: list[Path] = []
    while len(adapters) < MOST_ADAPTERS:
        with one_sentence(path, "is no adapter that can be merged"):
            base = adapter_files.base_of(Path(model_directory(path)))
        if base is None:
            return path, revision, adapters
        adapters.insert(0, Path(path))
        path, revision = base
    raise ValueError(f"model: {path!r} is one of {MOST_ADAPTERS} adapters or more upon each other; use a merged model")


def _read_config(path: str, revision: str | None) -> tuple[object, PreTrainedTokenizerBase]:
    """The config and the tokenizer; raises as `load_policy`."""
    source = model_directory(path)
    refuse_no_model(path, source)
    with one_sentence(path):
        config = AutoConfig.from_pretrained(source, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    refuse_quantized(path, config)
    refuse_empty_tokenizer(path, tokenizer)
    return config, tokenizer


def _load_decoder(
    model: CausalLM, path: str, revision: str | None, tokenizer, precision: str, dtype: torch.dtype
) -> Policy:
    """Read the weights of a family that the decoder knows; raises as `load_policy`."""
    source = model_directory(path)
    refuse_unsupported(model, tokenizer)  # before gigabytes are read
    with one_sentence(path):
        local = Path(source).is_dir()
        directory = Path(source) if local else weights.fetched(source, revision)
        unused = weights.fill(model, weights.stored(directory), dtype)
        with suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
    refuse_quantized(path, model.config, unused)
    weights.refuse_unused(model, unused, path)
    policy = Policy(model, tokenizer, precision).train()
    policy.commit = None if local else directory.name
    refuse_not_finite(path, tree_logprobs(policy))
    return policy


def _load_wrapped(path: str, revision: str | None, tokenizer, precision: str, dtype: torch.dtype) -> Policy:
    """Load a model of another family as transformers does; raises as `load_policy`."""
    with one_sentence(path):
        model, report = AutoModelForCausalLM.from_pretrained(
            model_directory(path), revision=revision, dtype=dtype, output_loading_info=True
        )
    kind = type(model).__name__
    if missing := sorted(report["missing_keys"]):  # transformers filled these at random
        raise ValueError(f"model: {path!r} lacks {len(missing)} weights of a {kind}, such as {missing[0]}")
    refuse_quantized(path, model.config, report["unexpected_keys"])
    weights.refuse_unused(model, report["unexpected_keys"], path)
    refuse_unsupported(model, tokenizer)
    own = own_logprobs(model)
    refuse_not_finite(path, own)
    policy = Policy(model, tokenizer, precision).train()
    refuse_if_different(policy, own)
    if distributed.is_main():
        said = f"model: a {kind} runs as transformers wrote it, slower than the families that grpo computes itself"
        print(f"{said} ({', '.join(FAMILIES)})", file=sys.stderr, flush=True)
    return policy


def load_shapes(
    path: str | PathLike, revision: str | None = None
) -> tuple[CausalLM | PreTrainedModel, PreTrainedTokenizerBase]:
    """A model without weights (on the meta device, so it cannot run), to read its sizes, and its real tokenizer.

    Args:
        path, revision: as for `load_policy`.

    Raises:
        ValueError: the model cannot be found or read, or needs something that is not supported.
    """
    path, revision, _ = base_and_adapters(str(path), revision)
    config, tokenizer = _read_config(path, revision)
    model = weights.empty_decoder(config)
    with one_sentence(path), torch.device("meta"):
        model = model or AutoModelForCausalLM.from_config(config)
        with suppress(OSError):  # not every model has one; what it names as EOS counts
            model.generation_config = GenerationConfig.from_pretrained(model_directory(path), revision=revision)
    refuse_unsupported(model, tokenizer)
    return model, tokenizer


@contextmanager
def one_sentence(path: str, what: str = "can not be loaded, as a directory or from the hub") -> Iterator[None]:
    """Turn what transformers raises when it reads or writes a model into one sentence that names the option."""
    try:
        yield
    except Exception as error:  # inconsistent files raise errors of many types
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        reason = " ".join(str(error).split()) if first.endswith(":") else first
        raise ValueError(f"model: {path!r} {what}: {reason}") from None


def model_directory(path: str) -> str:
    """The directory or hub name that a config's `model` stands for; the only special names are those of `SHIPPED`."""
    return str(SHIPPED.get(path, path))


def _probe(vocabulary: int) -> tuple[list[int], list[list[int]]]:
    """The small tree that forwards are compared on: a prompt and two completions of it."""
    tokens = torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    return tokens[:4], [tokens[4:7], tokens[7:]]


@torch.no_grad()
def tree_logprobs(policy: Policy, attention: type[TreeAttention] = TreeAttention) -> Tensor:
    """[5] log-probabilities of `_probe` by tree attention and our head, without autocast."""
    head = policy.model.get_output_embeddings().weight
    prompt, completions = _probe(len(head))
    tree = pack([prompt], [completions])
    with torch.autocast("cpu", enabled=False):
        over = attention(tree.position_ids, tree.subtree_end, policy.heads.per_key)
        hidden = policy.hidden_states(tree.input_ids, tree.position_ids, over)
        return linear_logprobs(hidden[tree.source], head, tree.target)[0]


@torch.no_grad()
def own_logprobs(model: PreTrainedModel) -> Tensor:
    """[5] log-probabilities of `_probe` by the model's own forward in eval mode."""
    prompt, completions = _probe(len(model.get_output_embeddings().weight))
    training = model.training
    model.eval()
    plain = []
    for completion in completions:
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        plain.append(logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0])
    model.train(training)
    return torch.cat(plain)


def refuse_not_finite(path: str, logprobs: Tensor) -> None:
    """Raise ValueError if log-probabilities of a model are NaN or infinite."""
    if not logprobs.isfinite().all():
        raise ValueError(f"model: {path!r} gives log-probabilities that are not finite; are its weights damaged?")


def refuse_if_different(policy: Policy, own: Tensor) -> None:
    """Compare a model of transformers over our attention with its own forward; decoding is compared by the sampler.

    Args:
        policy: compared as in learning (train mode) and as in prefill (eval mode).
        own: `own_logprobs` of its model.

    Raises:
        ValueError: they differ.
    """
    training, gaps, kind = policy.training, {}, type(policy.model).__name__
    for mode, attention in ((False, PrefillAttention), (True, TreeAttention)):
        try:
            gaps[mode] = float((tree_logprobs(policy.train(mode), attention) - own).abs().max())
        except RuntimeError as error:  # shapes that do not fit
            reason = str(error).partition("\n")[0]
            raise ValueError(f"model: {kind} can not be computed with tree attention: {reason}") from error
    policy.train(training)
    gap = max(gaps.values())
    if gaps[False] < 1e-3 <= gap:
        raise ValueError(
            f"model: {kind} computes something else in train mode than in eval mode, such as noise: log-probabilities "
            f"differ by {gap:.2g} nats, and sampler, policy and reference have to agree"
        )
    if not gap < 1e-3:
        raise ValueError(
            f"model: {kind} computes something that tree attention does not support: log-probabilities differ from its "
            f"own forward by {gap:.2g} nats"
        )
