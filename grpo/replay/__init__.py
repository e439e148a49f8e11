"""What another objective would have made of a step: its gradient beside that of the run.

`saved.py` writes and reads what a step has sampled, `gradients.py` makes the step again, and `python -m grpo.replay`
prints both. Left out: other completions, and the steps that would have come after another gradient.
"""
