"""Benchmarks that anyone can repeat. The project itself imports nothing from here.

    python -m bench.peers       compare our step with TRL, our sampling with Hugging Face's, both with this machine
    python -m bench.scaling     measure how time and memory grow with shots, group, new tokens and vocabulary

docs/benchmarks.md explains how to read the results.
"""
