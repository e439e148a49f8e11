"""Make the base models that the demos begin with."""
