"""What a family of models chooses: one small `Spec`, read from the config of a Hugging Face checkpoint.

The decoder (`decoder.py`) reads nothing else. Every key of a config is computed with, known to change no result, or
refused, because a key that is read over in silence gives wrong numbers. Left out: weights (`weights.py`); families
without a row in `FAMILIES`, which run as transformers wrote them (`wrapped.py`).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FAMILIES = ("granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""The `model_type`s that the decoder computes."""

COMPUTED = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
rms_norm_eps tie_word_embeddings rope_parameters attention_bias mlp_bias no_rope_layers
embedding_multiplier attention_multiplier residual_multiplier logits_scaling
no_rope_layer_interval sliding_window use_sliding_window layer_types
"""
"""Keys that the decoder computes with, in every family that has them."""
READ_ELSEWHERE = """
model_type rope_theta rope_scaling max_window_layers
"""
"""Keys from which transformers makes one of `COMPUTED` when it reads a config."""
WITHOUT_EFFECT = """
architectures auto_map transformers_version dtype torch_dtype initializer_range use_cache pretraining_tp
max_position_embeddings original_max_position_embeddings
bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class
attention_dropout resid_pdrop embd_pdrop is_llama_config return_dict output_hidden_states output_attentions
id2label label2id num_labels problem_type task_specific_params chunk_size_feed_forward is_encoder_decoder
transformers.js_config unsloth_fixed unsloth_version
"""
"""Keys that change no log-probability of this project, besides those that begin with `_`. Dropout is always 0 here."""


@dataclass(frozen=True)
class Spec:
    """The sizes and choices of a decoder."""

    vocabulary: int
    """Rows of the embedding."""
    width: int
    """D, of the residual stream."""
    mlp_width: int
    layers: int
    heads: int
    """H, the query heads."""
    key_heads: int
    """Hkv, the heads of keys and values."""
    head_width: int
    """d."""
    eps: float
    """Added to the mean square in every norm."""
    tied: bool
    """The output head is the embedding."""
    bias_of_qkv: bool
    bias_of_out: bool
    bias_of_mlp: bool
    head_norms: Literal["none", "each", "together"]
    """Norms of queries and keys: none, over each head (Qwen3), or over all heads together (OLMo 2)."""
    norms_behind: bool
    """Attention and MLP are normalised behind and not in front of them (OLMo 2)."""
    rotates: tuple[bool, ...]
    """For each layer, whether it turns queries and keys by their positions (in SmolLM3 some layers do not)."""
    scaling: float
    """Multiplies the attention scores."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Multiplies what attention and MLP add to the residual stream."""
    logits_scaling: float = 1.0
    """Divides the logits."""
    joint: bool = False
    """The file holds q, k, v in one matrix, and gate and up in another (Phi-3)."""


def spec_of(config: PretrainedConfig) -> Spec | None:
    """The spec of a config; None: the decoder does not compute such a model, and transformers' own code has to.

    Raises:
        ValueError: a key is unknown and not at its default, so that nobody knows what it would change.
    """
    family = config.model_type
    if family not in FAMILIES or _beyond(config):
        return None
    refuse_unknown(config)
    heads = head_sizes(config)
    bias = getattr(config, "attention_bias", False)
    scaling = config.attention_multiplier if family == "granite" else heads.width**-0.5
    layers = config.num_hidden_layers
    rotates = getattr(config, "no_rope_layers", None) or [1] * layers
    return Spec(
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        layers=layers,
        heads=heads.heads,
        key_heads=heads.key_heads,
        head_width=heads.width,
        eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        bias_of_qkv=bias or family == "qwen2",
        bias_of_out=bias,
        bias_of_mlp=getattr(config, "mlp_bias", False),
        head_norms={"qwen3": "each", "olmo2": "together"}.get(family, "none"),
        norms_behind=family == "olmo2",
        rotates=tuple(map(bool, rotates[:layers])),
        scaling=scaling,
        embedding_multiplier=getattr(config, "embedding_multiplier", 1.0),
        residual_multiplier=getattr(config, "residual_multiplier", 1.0),
        logits_scaling=getattr(config, "logits_scaling", 1.0),
        joint=family == "phi3",
    )


def _beyond(config: PretrainedConfig) -> bool:
    """Whether a config of a known family asks for something that the decoder leaves to transformers."""
    rope = config.rope_parameters or {}
    return config.hidden_act not in ("silu", "swish") or rope.get("partial_rotary_factor", 1.0) != 1.0


def refuse_unknown(config: PretrainedConfig) -> None:
    """Raise ValueError if a key of the config is not known, and its value is neither empty nor the default."""
    default = type(config)().to_dict()
    # What other families compute with, transformers reads over in a family that has no such key.
    known = default.keys() & COMPUTED.split() | {"head_dim"} | set((READ_ELSEWHERE + WITHOUT_EFFECT).split())
    for name, value in sorted(config.to_dict().items()):
        if name not in known and not name.startswith("_") and value and value != default.get(name):
            raise ValueError(
                f"model: its config has {name} = {str(value)[:60]}, which a {config.model_type} decoder does not know; "
                "the numbers could be wrong without a sign, so it is refused"
            )


class HeadSizes(NamedTuple):
    """The sizes of a model's attention heads."""

    heads: int
    """H, the number of query heads."""
    key_heads: int
    """Hkv, the number of key and value heads."""
    width: int
    """d, the width of one head."""

    @property
    def per_key(self) -> int:
        """How many query heads read one key head (grouped-query attention)."""
        return self.heads // self.key_heads


def head_sizes(config: PretrainedConfig) -> HeadSizes:
    """The head sizes of any decoder's config; what it does not say follows from the rest."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):  # GPTBigCode
        key_heads = 1
    return HeadSizes(heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads)


def frequencies(config: PretrainedConfig) -> tuple[Tensor, float]:
    """Rotary frequencies [d/2] in radians per position, float32, and the factor of cosines and sines.

    The plain ones are theta^(-2i/d), https://arxiv.org/abs/2104.09864. The scaled kinds (llama3, yarn, linear) come
    from transformers' own table.
    """
    rope, width = config.rope_parameters, head_sizes(config).width
    with torch.device("cpu"):  # also where the model itself is made without memory
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width), 1.0
