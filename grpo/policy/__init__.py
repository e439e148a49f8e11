"""The model: load it, run it over packed token trees, freeze a reference, save it. What others need is named here."""

from grpo.policy.model import (
    EMBEDDED,
    Policy,
    eos_ids,
    frozen_copy,
    load_policy,
    load_shapes,
    model_directory,
    save_model,
    scatter,
    token_logprobs,
)
from grpo.policy.reference import Reference, remembers

__all__ = [
    "EMBEDDED",
    "Policy",
    "Reference",
    "eos_ids",
    "frozen_copy",
    "load_policy",
    "load_shapes",
    "model_directory",
    "remembers",
    "save_model",
    "scatter",
    "token_logprobs",
]
