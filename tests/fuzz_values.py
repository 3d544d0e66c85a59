"""Values of every kind, and one change of what is valid: the parts of `fuzz_inputs`."""

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial
from random import Random

import mlx.core as mx
import numpy as np
import pandas as pd

from cortexlab.errors import shown


@dataclass(frozen=True, slots=True)
class Input:
    """One input: ``words`` to repeat it by hand, and what runs it."""

    words: str
    run: Callable[[], object]
    line: list[str] | None = None  # of a command
    misspelt: bool = False  # a keyword that does not exist: a TypeError is right


# --- values, and one change of a valid input ------------------------------------------------------

TEXTS = (
    *("", " ", "0", "-1", "1", "1.5", "3", "nan", "inf", "-inf", "1e400", "1e308", "2147483648"),
    *("9" * 5000, "true", "None", "[]", "{}", "é日本", "\udcff", "a\nb", "\0", "a\0b", "٣", "²"),
    *("../up", "/dev/null", "/proc/no", ".", "..", "~", "x" * 300, "-", "--", "-x", "--json", "%s"),
    *("1,2", ",", "16,", "16,x", "50%", "0%", "1e9%", "%", "static,static", "a:b", "os:getcwd"),
    *("cortexlab.allocators:Paged", "json:", ":", "=", "*", "{0}", "unlimited", "auto", "trace"),
)
PLAIN = (  # values that a file can hold
    *(None, True, False, 0, -1, 1, 3, 1.5, -0.0, 2**31, 2**63, 2**64, 10**400, 1e308),
    *(math.nan, math.inf, -math.inf, [], {}, [None], [[]], {"a": [1]}, [1, "a"], *TEXTS),
)


class Own(Exception):
    """An error of a function that the caller gave."""


class Mute:
    """What can neither be shown nor compared."""

    def __repr__(self):
        raise RuntimeError("no words")

    def __eq__(self, other):
        raise RuntimeError("like nothing")


def raising(*given, **more):
    """Raise the caller's own error."""
    raise Own("the caller's\nown")


def _odd() -> tuple:
    """Values that only a caller of the library can give."""
    return (
        *(b"bytes", (), set(), range(3), object(), Decimal("NaN"), Fraction(1, 2), 1j, raising),
        *(np.nan, np.int64(3), np.float32(2), np.array([]), np.array([1, 2]), np.array(3)),
        *(np.array("a"), mx.array(2), mx.array([1.5, 2.5]), mx.zeros((0,)), pd.NA, pd.NaT),
        *(lambda *given, **more: 1, iter([1]), [object()], "paged", "static", ["paged"], Mute()),
    )


def value(rng: Random) -> object:
    """Any value."""
    return rng.choice(PLAIN) if rng.random() < 0.6 else rng.choice(_odd())


def changed(rng: Random, given: object, new: Callable[[Random], object] | None = None) -> object:
    """A copy of nested dicts and lists with one node replaced, left out, added or wrapped."""
    new = new or (lambda rng: rng.choice(PLAIN))
    if isinstance(given, dict | list) and given and rng.random() < 0.85:
        copy = given.copy()
        key = rng.choice([*copy]) if isinstance(copy, dict) else rng.randrange(len(copy))
        how = rng.random()
        if how < 0.75:
            copy[key] = changed(rng, copy[key], new)
        elif how < 0.9:
            del copy[key]
        elif isinstance(copy, dict):
            copy[rng.choice(("more", "", "é", " x", key.upper()))] = new(rng)
        else:
            copy.insert(key, new(rng))
        return copy
    return [given] if rng.random() < 0.1 else new(rng)


def damaged(rng: Random, data: bytes) -> bytes:
    """The bytes of a file with one piece cut off, put in, doubled or packed."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    junk = rng.choice((b"\0", b"\xff\xfe", b'"', b"\r", b"\n\n", b"{", b"]", b",", b"&a *a"))
    pieces = [b"", data[:at], data[:at] + data[to:], data[:at] + junk + data[at:]]
    pieces += [data[:at] + junk + data[to:], data + data, b"\xef\xbb\xbf" + data]
    pieces += [data.decode(errors="replace").encode("utf-16"), data.replace(b"\n", b"\r")]
    pieces += [gzip.compress(data)[: max(1, at)], b"\x1f\x8b" + data, b"\x28\xb5\x2f\xfd" + data]
    return rng.choice([*pieces, rng.randbytes(50)])


def call(rng: Random, function: Callable, given: dict, *, free: bool = False) -> Input:
    """A call with one argument changed, misspelt or added; ``free``: more than one, or none."""
    given, misspelt = dict(given), False
    for _ in range(rng.choice((0, 2, 3)) if free else 1):
        name = rng.choice([*given])
        if rng.random() < 0.05:
            misspelt = True
            given[name + rng.choice(("s", "_"))] = given.pop(name)
        else:
            given[name] = changed(rng, given[name], value) if rng.random() < 0.3 else value(rng)
    said = ", ".join(f"{name}={shown(given[name])}" for name in given)
    name = getattr(function, "__qualname__", None) or function.func.__qualname__
    return Input(f"{name}({said})", partial(function, **given), misspelt=misspelt)
