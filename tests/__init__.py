"""So that `tests` is this folder, and not a package of that name that a library has installed."""
