"""The doctor: what is wrong with a recipe before it runs, what it will cost, and what goes wrong while it runs."""
