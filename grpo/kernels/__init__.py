"""Fast operations for the hardware at hand: oneDNN on a CPU, torch.compile and Triton on a GPU.

Left out: anything about GRPO. Nothing in this folder imports other code of this project.
"""
