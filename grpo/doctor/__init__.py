"""The doctor: find what is wrong with a recipe before it runs, estimate its cost, and warn of trouble during a run."""
