"""Products and steps on the hardware at hand: oneDNN on a CPU, torch.compile on a GPU. No word of GRPO in here."""
