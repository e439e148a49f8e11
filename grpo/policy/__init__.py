"""The model: load it, run it over packed token trees, freeze a reference, save it.

Most other code needs only the names listed here. Left out: drawing completions (`sampler/`); learning (`update.py`).
"""

from grpo.policy.attention import head_sizes
from grpo.policy.load import EMBEDDED, load_policy, load_shapes, model_directory, prepare_saving, save_model
from grpo.policy.model import Policy, eos_ids, frozen_copy, scatter, token_logprobs
from grpo.policy.reference import Reference, remembers

__all__ = [
    "EMBEDDED",
    "Policy",
    "Reference",
    "eos_ids",
    "frozen_copy",
    "head_sizes",
    "load_policy",
    "load_shapes",
    "model_directory",
    "prepare_saving",
    "remembers",
    "save_model",
    "scatter",
    "token_logprobs",
]
