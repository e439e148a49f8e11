"""What each rule optimises, exactly: expected gradients by enumeration, without a model and without sampling.

`exact.py` computes them, and `python -m grpo.oracle` prints them as tables, with every entry of the algorithm's tables.
Left out: updates of more than one question, and whatever only a real model shows.
"""
