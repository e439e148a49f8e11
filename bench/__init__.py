"""Benchmarks that anyone can repeat. The project itself imports nothing from here.

    python -m bench.peers       compare our step with TRL, and our sampling with Hugging Face's, on the same work
    python -m bench.roofline    compare our step with the lower bound of this machine
    python -m bench.scaling     measure how time and memory grow with shots, group, new tokens and vocabulary
    python -m bench.stopping    measure rollouts whose rows end early, with and without refilling

docs/benchmarks.md explains how to read the results.
"""
