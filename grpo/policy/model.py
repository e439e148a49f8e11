"""Load a policy and its tokenizer; freeze a reference; log-probabilities of a batch.

The policy is one `nn.Module` whose forward takes a packed token tree and returns log-probabilities and entropy, head
product included. `DistributedDataParallel` wraps exactly that module and learning calls nothing else of it. Any decoder
of transformers works that computes plain softmax attention through its attention interface (Llama, Qwen2, Qwen3,
Mistral families); each is compared with its own plain forward when it is loaded, and refused if the two differ.
Left out: adapters, quantization, sharded weights.
"""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from grpo.batch import Batch
from grpo.logprobs import linear_logprobs
from grpo.policy import attention_flex
from grpo.policy.attention import Attention, KeysValues, TreeAttention, head_sizes
from grpo.policy.float64 import keep_float64
from grpo.policy.lean import keep_less, norms_made_again
from grpo.tree import PackedTree, pack

EMBEDDED = Path(__file__).parent.parent / "base_model"
"""Where the model named `embedded` lies: about a million parameters, made by `python -m grpo.pretrain`."""

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision -> what matrix products are rounded to; master weights are float32 (float64 under fp64) in every one."""


class Policy(nn.Module):
    """A causal language model over packed token trees."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str = "fp32"):
        """Wrap a model of transformers; its attention implementation becomes `tree`, its dropout 0.

        Args:
            model: a decoder with an output head.
            tokenizer: rows of the vocabulary that it lacks are cut off.
            precision: a key of `AUTOCAST`.
        """
        super().__init__()
        refuse_unsupported(model, tokenizer)
        model.set_attn_implementation("tree")
        remove_dropout(model)
        if AUTOCAST[precision] is None:
            keep_less(model)
        self.model = model
        self.vocab_size = len(tokenizer)
        self.autocast_dtype = AUTOCAST[precision]
        self.compiled = False
        self.heads = head_sizes(model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, each of the same code."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @property
    def head(self) -> Tensor:
        """[V,D] output weights, without rows that no token has."""
        weight = self.model.get_output_embeddings().weight
        return weight if len(weight) == self.vocab_size else weight[: self.vocab_size]

    def autocast(self) -> torch.autocast:
        """The autocast that sampling, learning and reference all run under."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, tree_attention: Attention) -> Tensor:
        """[S], [S] -> [S,D]: the decoder without its head, never compiled: for all but learning.

        What is compiled is compiled for learning; every length of a decode would be a new case.
        """
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            return self._run_layers(input_ids, position_ids, tree_attention)

    def _run_layers(self, input_ids: Tensor, position_ids: Tensor, tree_attention: Attention) -> Tensor:
        """[S], [S] -> [S,D], through compiled layers where they are.

        The module tree is that of transformers; forwards of norms, MLPs and attention in it are those of `lean.py`
        (without autocast), `float64.py` or `compiled.py`, and attention ends in `tree_attention.attend`.
        """
        ready_mask = torch.empty(1, 1, 1, 1, device=input_ids.device)  # 4-D: transformers builds none of its own
        return self.model.base_model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            attention_mask=ready_mask,
            use_cache=False,
            tree_attention=tree_attention,
        ).last_hidden_state[0]

    def forward(self, tree: PackedTree, temperature: float, trunk: KeysValues | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every prediction of the tree.

        Args:
            tree: a packed token tree, on the policy's device.
            temperature: divides the logits.
            trunk: keys and values [Hkv,t,d] per layer of the first t tokens, which then are not computed; they predict
                nothing, and all rows begin with them. Not where layers are compiled.

        Returns:
            logprobs [M] and entropy [M], float32 (float64 under fp64).
        """
        if self.compiled and attention_flex.usable(self.device, self.autocast_dtype, self.heads.width):
            tree = tree.padded(attention_flex.padded_size(len(tree.input_ids)))
            attention, known = attention_flex.FlexAttention(tree.subtree_end, self.autocast_dtype), 0
        else:
            attention = TreeAttention(tree.position_ids, tree.subtree_end, self.heads.per_key, trunk)
            known = attention.known
        with self.autocast(), nullcontext() if self.compiled or self.autocast_dtype else norms_made_again():
            hidden = self._run_layers(tree.input_ids[known:], tree.position_ids[known:], attention)
            hidden = hidden[tree.source - known]  # whose gradient a GPU adds up in the same order every time
            return linear_logprobs(hidden, self.head, tree.target, temperature, compiled=self.compiled)


def token_logprobs(policy: nn.Module, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a batch's completion tokens.

    Args:
        policy: a `Policy`, or a module that wraps one.
        batch: `prompt_ids`, `completion_ids` and `completion_mask` are read.
        temperature: divides the logits.

    Returns:
        logprobs [B,T] and entropy [B,T], 0 where there is no token.
    """
    tree = pack(batch.prompt_ids, batch.completions()).to(batch.completion_ids.device)
    return scatter(tree, policy(tree, temperature), batch.completion_ids.shape)


def scatter(tree: PackedTree, values: tuple[Tensor, ...], shape: torch.Size) -> tuple[Tensor, ...]:
    """Per-prediction values [M] -> padded [B,T] tensors, 0 elsewhere; differentiable."""
    return tuple(value.new_zeros(shape).index_put((tree.row, tree.column), value) for value in values)


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
def _one_sentence(path: str) -> Iterator[None]:
    """Turn what transformers raises when it reads a model into one sentence that names the option."""
    try:
        yield
    except Exception as error:  # files that do not fit together raise whatever their reader runs into
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"model: {path!r} can not be loaded, as a directory or from the hub: {reason}") from None


def model_directory(path: str) -> str:
    """The directory or hub name behind the name in a config."""
    return str(EMBEDDED) if path == "embedded" else path


def save_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a Hugging Face directory (safetensors, configs, tokenizer), whole or not at all; replaces an older one.

    Raises:
        OSError: one sentence, when the disk is full or not writable.
    """
    temporary = directory.with_name(directory.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        policy.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except Exception as error:  # for a full disk safetensors raises its own, and tokenizers a bare Exception
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise OSError(f"cannot write {directory} ({reason})") from error


def frozen_copy(policy: Policy) -> Policy:
    """A copy without gradients, for the reference and for sampling: same forward, same autocast, same numbers.

    Only weights that autocast would round anyway (linear layers; not embeddings, norms, head) are stored rounded.
    """
    frozen = copy.deepcopy(policy).requires_grad_(False)
    frozen.compiled = False  # nn.Module leaves what `compile` made out of its copies
    head = frozen.model.get_output_embeddings()
    if policy.autocast_dtype is not None:
        for module in frozen.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.to(policy.autocast_dtype)
    return frozen


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's, the model's and the generation config's."""
    ids: set[int] = set()
    for source in (tokenizer, model.config, model.generation_config):
        value = getattr(source, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    return sorted(i for i in ids if i >= 0)


def remove_dropout(model: PreTrainedModel) -> None:
    """Set every dropout to 0, modules and the numbers that layers keep: sampler, policy and reference have to agree."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def refuse_unsupported(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError naming what the model needs and tree attention or the chunked head does not compute."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if any(kind != "full_attention" for kind in layer_types) or (not layer_types and window is not None):
        needs = "a sliding window or another kind of layer than full attention"
    elif getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        needs = "logit soft-capping"
    elif rope.get("rope_type") in ("dynamic", "longrope"):
        needs = f"rope_type {rope['rope_type']!r}, under which a row depends on the lengths of others"
    elif not model._supports_attention_backend or config.is_encoder_decoder:
        needs = "its own attention code; only decoders that use transformers' attention interface work"
    elif not isinstance(head, nn.Linear) or head.bias is not None:
        needs = "an output head other than one linear layer without bias"
    elif len(tokenizer) > len(head.weight):
        needs = f"{len(tokenizer)} output rows for its tokenizer, and has {len(head.weight)}"
    else:
        return
    raise ValueError(f"model: {type(model).__name__} needs {needs}, which is not supported")


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
