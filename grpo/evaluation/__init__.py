"""Evaluation: how it is asked, what was answered, how that is graded and compared, and what can be claimed."""
