"""GRPO with verifiable rewards, from scratch in raw PyTorch. Start reading at `train.py`, then `grpo/advantages.py`."""

import os

# Threads that wait for work sleep instead of spinning: where other processes compute, spinning threads take the cores
# from those that work. It is read when torch is loaded, so commands import this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
