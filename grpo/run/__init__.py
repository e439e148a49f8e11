"""A run on disk and in a shell: directory, state, checkpoints, log, signals, machine.

Left out: sampling and learning.
"""
