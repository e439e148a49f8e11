"""The names of the splits, and how examples are divided among them: by a seed, or by what they are. Reads nothing."""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence

SPLITS = ("train", "validation", "test")


def hold_out(examples: Sequence, seed: int, *, at_most: int, key: Callable[[object], str]) -> tuple[list, list]:
    """Hold out a tenth of the examples, drawn by the seed.

    Examples with equal keys stay on one side, so nothing is both trained on and held out. Both sides keep the order of
    the data. A single example is kept; of two, one is held out.

    Args:
      examples: to divide.
      seed: decides which examples are held out.
      at_most: hold out at most this many keys.
      key: gives the text that identifies an example.

    Returns:
      (kept, held_out)
    """
    keys = list(dict.fromkeys(map(key, examples)))
    size = min(at_most, math.ceil((len(keys) - 1) / 10))
    drawn = set(random.Random(f"hold out {seed}").sample(keys, size))
    kept = [example for example in examples if key(example) not in drawn]
    return kept, [example for example in examples if key(example) in drawn]


def part_of(split: str, parts: Mapping[str, Callable[[], list]], seed: int, *, key: Callable[[object], str]) -> list:
    """The examples of a split, of data that may come without some of the splits.

    A test split that is missing is held out of train, and so is then a validation split: a tenth each, at most 500.

    Args:
      split: `train`, `validation` or `test`.
      parts: {split: gives its examples}, at least `split` itself or `train`.
      seed: draws what is held out.
      key: as in `hold_out`.
    """
    if split in parts and split != "train":
        return parts[split]()
    kept = parts["train"]()
    for name in ("test", "validation"):
        if name not in parts:
            kept, held_out = hold_out(kept, seed, at_most=500, key=key)
            if name == split:
                return held_out
    return kept


def by_hash(key: str, *, train: int, validation: int) -> str:
    """The split of an example that is generated, decided by its key alone. So other words do not move it.

    Args:
      key: equal for examples that are the same.
      train: percent of all keys.
      validation: percent of all keys; what is left is test.
    """
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    if percent < train:
        return "train"
    return "validation" if percent < train + validation else "test"
