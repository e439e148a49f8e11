"""Measurements that anyone can repeat: against peers, against the machine, and over sizes. Nothing here is imported.

    python -m bench.peers       our step beside TRL's and Hugging Face's ways to sample, the same work for all
    python -m bench.roofline    what a step must cost on this machine, and how far above that it is
    python -m bench.scaling     how time and memory grow with shots, group, new tokens and vocabulary
    python -m bench.stopping    what rows that end early cost, and rows that join in their place

docs/benchmarks.md says how to read them.
"""
