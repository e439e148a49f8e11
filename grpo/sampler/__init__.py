"""Prompts -> completions, by hand: prefill, decode, draw, stop. What others need is named here."""

from grpo.sampler.generate import Sampler

__all__ = ["Sampler"]
