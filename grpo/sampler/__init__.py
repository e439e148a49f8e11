"""Prompts -> completions, without an inference engine: prefill, decode, draw, stop.

Other code imports only the names listed here. Left out: the model itself (`policy/`) and rewards (`rollout.py`).
"""

from grpo.sampler.generate import Sampler

__all__ = ["Sampler"]
