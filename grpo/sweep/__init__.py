"""A grid of runs: train every cell, evaluate it, and show all of them in one table and one picture."""
