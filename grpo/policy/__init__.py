"""The model: load it, run it over packed token trees, freeze a reference, save it.

Most other code needs only the names listed here. Left out: drawing completions (`sampler/`); learning (`update.py`).
"""

from grpo.policy.limits import positions_of, refuse_beyond_positions
from grpo.policy.load import EMBEDDED, load_policy, load_shapes, model_directory
from grpo.policy.lora import add_adapters, linear_layers, trained
from grpo.policy.model import Policy, scatter, token_logprobs
from grpo.policy.reference import frozen_copy, mix_in, reference_of
from grpo.policy.save import prepare_saving, save_adapters, save_model
from grpo.policy.sharding import is_sharded, shard, shards
from grpo.policy.spec import head_sizes
from grpo.policy.tokens import eos_ids, num_ids, special_tokens

__all__ = [
    "EMBEDDED",
    "Policy",
    "add_adapters",
    "eos_ids",
    "frozen_copy",
    "head_sizes",
    "is_sharded",
    "linear_layers",
    "load_policy",
    "load_shapes",
    "mix_in",
    "model_directory",
    "num_ids",
    "positions_of",
    "prepare_saving",
    "reference_of",
    "refuse_beyond_positions",
    "save_adapters",
    "save_model",
    "scatter",
    "shard",
    "shards",
    "special_tokens",
    "token_logprobs",
    "trained",
]
