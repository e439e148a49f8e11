"""GRPO with verifiable rewards, from scratch in raw PyTorch. Start reading at `train.py`, then `grpo/advantages.py`."""

import importlib.util
import os
import sys
from pathlib import Path

# Threads that wait for work spin for a tenth of OpenMP's usual time, then sleep. Where other processes compute,
# spinning threads take the cores from those that work. Without any spinning, a step on a quiet machine takes 1.6 times
# as long. OpenMP reads this when torch is loaded, so commands import this package first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("data", "rewards")
"""Packages beside this one that it imports by these names."""


def _found(name: str) -> Path | None:
    """The directory or file that `import name` gives, or has given; None: there is none."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None) if module else importlib.util.find_spec(name)
    origin = getattr(module, "__file__", None) or getattr(spec, "origin", None)
    if origin is None:  # a directory without __init__.py
        origin = next(iter(getattr(spec, "submodule_search_locations", None) or ()), None)
    place = origin and Path(origin).resolve()
    return place.parent if place and place.name == "__init__.py" else place


def _refuse_collisions() -> None:
    """Raise ImportError if another project's `data` or `rewards` would be imported in place of ours."""
    for name in BESIDE:
        found = _found(name)
        if found == ROOT / name:
            continue
        taken = f"`import {name}` finds {found}" if found else f"there is no package {name}"
        sentence = (
            f"grpo needs the package `{name}` that lies beside it ({ROOT / name}), but {taken}; rename that one, start "
            f"from another directory, or put {ROOT} first in PYTHONPATH and start Python with -P"
        )
        if _is_ours(sys.orig_argv):
            print(f"grpo: error: {sentence}", file=sys.stderr)
            raise SystemExit(2)
        raise ImportError(sentence, name=name)


def _is_ours(command: list[str]) -> bool:
    """Whether a command line starts one of our own programs, `python -m grpo.report` or `python train.py`."""
    for option, value in zip(command, command[1:], strict=False):
        if option == "-m":
            return value in ("train", "eval") or value.startswith("grpo.")
    return Path(sys.argv[0] if sys.argv else "").resolve() in (ROOT / "train.py", ROOT / "eval.py")


_refuse_collisions()
