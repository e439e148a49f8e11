"""The model: load it, run it over packed token trees, freeze a reference, save it.

Most other code needs only the names listed here. Left out: drawing completions (`sampler/`); learning (`update.py`).
"""

from grpo.policy.attention import head_sizes
from grpo.policy.load import EMBEDDED, load_policy, load_shapes, model_directory, prepare_saving, save_model
from grpo.policy.model import (
    Policy,
    frozen_copy,
    learned_positions,
    refuse_beyond_positions,
    scatter,
    token_logprobs,
)
from grpo.policy.reference import Reference, remembers
from grpo.policy.tokens import eos_ids, num_ids, special_tokens

__all__ = [
    "EMBEDDED",
    "Policy",
    "Reference",
    "eos_ids",
    "frozen_copy",
    "head_sizes",
    "learned_positions",
    "load_policy",
    "load_shapes",
    "model_directory",
    "prepare_saving",
    "num_ids",
    "refuse_beyond_positions",
    "remembers",
    "save_model",
    "scatter",
    "special_tokens",
    "token_logprobs",
]
