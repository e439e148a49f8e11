"""Evaluation: prompt a model, keep its answers, grade and compare them, and say what the numbers support."""
