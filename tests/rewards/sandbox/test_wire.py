"""Values and frames: what crosses keeps its kind, and what a hostile process writes is refused or harmless."""

import collections
import enum
import json
import math
import os
from decimal import Decimal

import pytest

from rewards.sandbox import wire


class Colour(enum.IntEnum):
    RED = 3


class Liar(str):
    def __eq__(self, other):
        return True

    __hash__ = str.__hash__


PLAIN = [None, True, False, 0, -1, 2**53, -(10**5000), 0.1, -0.0, math.inf, "text", "\ud800", [], [1, [2.5, None]]]
PLAIN += [(), (1, (2,)), {1, 2}, frozenset({"a"}), {}, {1: "a", (2, 3): [4]}, {"int": 1}, b"\x00\xff", bytearray(b"a")]
PLAIN += [1 + 2j, complex(0, math.inf)]


def across(value):
    return wire.decode(json.loads(json.dumps(wire.encode(value))))


@pytest.mark.parametrize("value", PLAIN, ids=range(len(PLAIN)))
def test_plain_values_keep_value_and_kind(value):
    there = across(value)
    assert there == value and type(there) is type(value)
    assert isinstance(value, int) or repr(there) == repr(value)


def test_nan_stays_nan_and_an_iterator_keeps_its_items():
    assert math.isnan(across(math.nan))
    there = across(x * x for x in range(4))
    assert next(there) == 0 and list(there) == [1, 4, 9]


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Colour.RED, 3),
        (Liar("no"), "no"),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.namedtuple("P", "x y")(1, 2), (1, 2)),
    ],
)
def test_an_object_of_a_subclass_becomes_its_base(value, base):
    there = across(value)
    assert there == base and type(there) is type(base)


@pytest.mark.parametrize("value", [object(), Decimal(1), lambda: 1, len, int])
def test_other_objects_equal_nothing_and_are_neither_true_nor_false(value):
    there = across(value)
    assert there != value and there != there and there not in ([1], {2: 3})
    with pytest.raises(TypeError):
        bool(there)


def test_what_is_too_deep_or_cyclic_does_not_cross():
    cyclic, deep = [], []
    cyclic.append(cyclic)
    for _ in range(300):
        deep = [deep]
    for value in (cyclic, deep):
        with pytest.raises(ValueError, match="more than 200 containers"):
            wire.encode(value)


@pytest.mark.parametrize(
    "plain",
    [{}, {"int": "1", "float": "2"}, {"unknown": 1}, {"int": 5}, {"int": "x"}, {"set": [[]]}, {"dict": [[1]]},
     {"complex": [1]}, {"bytes": "zz"}, {"tuple": 3}, {"set": 1}],
)  # fmt: skip
def test_what_encode_can_not_have_written_raises(plain):
    with pytest.raises((ValueError, TypeError, KeyError)):
        wire.decode(plain)


def written(raw: bytes) -> int:
    ours, theirs = os.pipe()
    os.write(theirs, raw)
    os.close(theirs)
    return ours


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", EOFError),
        (b"\x00\x00", EOFError),
        (b"\x00\x00\x00\x05tru", EOFError),
        (b"\xff\xff\xff\xff", ValueError),
        (b"\x00\x00\x00\x03NaN", ValueError),
        (b"\x00\x00\x00\x04nope", ValueError),
        (b"\x00\x00\xea\x60" + b"[" * 60000, RecursionError),
        (b"\x00\x00\x20\x00" + b"9" * 0x2000, ValueError),  # more digits than Python reads
    ],
)
def test_frames_that_are_no_messages_raise(raw, error):
    fd = written(raw)
    with pytest.raises(error):
        wire.receive(fd)
    os.close(fd)


def test_a_frame_comes_back_and_one_too_long_is_not_sent():
    ours, theirs = os.pipe()
    wire.send(theirs, {"a": [1, "\ud800"]})
    assert wire.receive(ours) == {"a": [1, "\ud800"]}
    with pytest.raises(ValueError, match="more than 4,194,304"):
        wire.send(theirs, "x" * 2**22)
    os.close(ours)
    os.close(theirs)
