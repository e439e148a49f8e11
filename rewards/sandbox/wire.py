"""Frames and values that cross between processes which do not trust each other.

A frame is 4 bytes of length and JSON text. A value keeps its exact kind (a tuple stays a tuple), and an object of
anything else than plain data arrives as an `Opaque`, which equals nothing. Left out: pickle, marshal and eval, which
run what they read.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

MOST_BYTES = 4 * 2**20
"""The longest frame, in bytes."""
DEEPEST = 200
"""Containers in containers that a value may have."""
MOST_ITEMS = 100_000
"""Items that are taken of an iterator, such as a generator."""


PLAIN: dict[type, Callable] = {int: int.__int__, str: str.__str__, float: float.__float__, complex: complex.__complex__}
PLAIN |= {kind: kind for kind in (bytes, bytearray, tuple, list, set, frozenset, dict)}
"""How an object of a subclass becomes one of the class itself."""


class Opaque:
    """What stands where an object can not cross. It equals nothing, is neither true nor false, and can do nothing."""

    def __init__(self, kind: str):
        self.kind = kind

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("an object of the program is neither true nor false here")

    def __repr__(self) -> str:
        return f"<an object of the program: {self.kind}>"


def encode(value: Any, depth: int = 0) -> Any:
    """A value as plain JSON. Subclasses become their base. Raises ValueError for one that is too deep or cyclic."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(2**53) < value < 2**53 else {"int": hex(value)}  # hex has no limit of digits
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if depth > DEEPEST:
        raise ValueError(f"a value has more than {DEEPEST} containers in each other")
    if kind is list:
        return [encode(item, depth + 1) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item, depth + 1) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    for base, plain in PLAIN.items():
        if issubclass(kind, base):
            return encode(plain(value), depth)
    if isinstance(value, Iterator):
        return {"iterator": [encode(item, depth + 1) for item in itertools.islice(value, MOST_ITEMS)]}
    return {"opaque": kind.__name__}


def _number(parts: list) -> complex:
    real, imag = map(decode, parts)
    return complex(real, imag)


TAGS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "tuple": lambda items: tuple(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    "iterator": lambda items: iter([decode(item) for item in items]),
    "dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": _number,
    "opaque": lambda kind: Opaque(str(kind)),
}


def decode(plain: Any) -> Any:
    """The value of `encode`. What it can not have written raises an exception: mostly ValueError or TypeError."""
    if isinstance(plain, list):
        return [decode(item) for item in plain]
    if isinstance(plain, dict):
        ((tag, content),) = plain.items()
        return TAGS[tag](content)
    return plain


def send(fd: int, message: Any) -> None:
    """Write a frame. Raises ValueError if it is too long, OSError if nobody reads."""
    text = json.dumps(message).encode()
    if len(text) > MOST_BYTES:
        raise ValueError(f"a message has {len(text):,} bytes: more than {MOST_BYTES:,}")
    left = memoryview(len(text).to_bytes(4, "big") + text)
    while left:
        left = left[os.write(fd, left) :]


def receive(fd: int) -> Any:
    """Read a frame. Raises EOFError if there is none, ValueError or RecursionError if it is too long or not JSON."""
    size = int.from_bytes(_exactly(fd, 4), "big")
    if size > MOST_BYTES:
        raise ValueError(f"a message has {size:,} bytes: more than {MOST_BYTES:,}")
    return json.loads(_exactly(fd, size), parse_constant=_refuse)


def _exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 2**16))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
