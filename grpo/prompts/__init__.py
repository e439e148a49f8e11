"""What a model is asked: the options for it (`source.py`). `grpo/dataloader.py` makes the prompts of a step."""
