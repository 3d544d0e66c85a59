"""Errors that this package raises on purpose: one line with the wrong value and the allowed values,
and the checks that raise them.
"""

import math
import os
from collections.abc import Hashable, Iterator, Mapping, Set
from contextlib import contextmanager
from numbers import Real
from operator import index


class CortexLabError(Exception):
    """Base class of every error that this package raises on purpose. Its text is one line, even
    where it names a file with a line break in its name.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


class BadInput(CortexLabError, ValueError):
    """An argument, a file or a request that cannot be used."""


class NotContiguous(CortexLabError):
    """A single view was asked of a sequence whose tokens lie in several extents."""


class ModelError(BadInput):
    """A model that cannot be found, read or driven."""


MAX_COUNT = 2**31 - 1  # limit of blocks, tokens and requests: MLX's shapes are 32-bit
TEXT_OR_PAIRS = str, bytes, bytearray, Mapping  # kinds that iterate, but over no elements
NO_TOKEN_IDS = str, bytes, bytearray, memoryview, Set, Mapping  # kinds that iterate all the same


def at_least(name: str, value: object, minimum: int, maximum: int = MAX_COUNT) -> int:
    """Return ``value``, a whole number from ``minimum`` to ``maximum``; else raise `BadInput` with
    ``name`` and ``value``.
    """
    number = value if value.__class__ is int else whole(value)
    if number is None or not minimum <= number <= maximum:
        over = number is not None and number > maximum
        limit = f"at most {maximum}" if over else f"at least {minimum}"
        raise BadInput(f"{name} must be a whole number of {limit}, not {shown(value)}")
    return number


def plain(value: object) -> object:
    """What Python itself has for a number of NumPy's, or in an array without dimensions; any other
    ``value`` as it is.
    """
    is_single = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_single else value


def whole(value: object) -> int | None:
    """The whole number that ``value`` is, of whatever library; None for what is none, and for True
    and False.
    """
    value = plain(value)
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def real(value: object) -> float:
    """The real number that ``value`` is, of whatever library; NaN for what is none, for True and
    False, and for an int that no float can hold.
    """
    value = plain(value)
    try:
        is_real = isinstance(value, Real) and not isinstance(value, bool)
        return float(value) if is_real else math.nan
    except OverflowError:
        return math.nan


def a_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float, or `BadInput` naming ``name`` when it is no finite number from low to
    high.
    """
    number = real(value)
    if not low <= number <= high or math.isinf(number):
        least = f" of at least {low}" if math.isfinite(low) else ""
        limits = f"number from {low} to {high}" if math.isfinite(high) else f"finite number{least}"
        raise BadInput(f"{name} must be a {limits}, not {shown(value)}")
    return number


def share(name: str, value: object) -> float:
    """``value`` as a float, or `BadInput` naming ``name`` when it is no number from 0 to below
    1.
    """
    number = real(value)
    if not 0 <= number < 1:
        raise BadInput(f"{name} must be a share of the pool, from 0 to below 1, not {shown(value)}")
    return number


def yes_or_no(name: str, value: object) -> bool:
    """True or False, which ``value`` is; else raise `BadInput` with ``name`` and ``value``."""
    answer = plain(value)
    if not isinstance(answer, bool):
        raise BadInput(f"{name} must be True or False, not {shown(value)}")
    return answer


def a_function(name: str, value: object):
    """``value``, or `BadInput` naming ``name`` when it is neither a function nor None."""
    if value is not None and not callable(value):
        raise BadInput(f"{name} must be a function, not {shown(value)}")
    return value


def a_sequence(name: str, value: object, of: type = object, least: int = 0) -> tuple:
    """``value`` as a tuple, or `BadInput` naming ``name`` when it is none, has fewer than ``least``
    elements, or one of another kind than ``of``. A text or a mapping is no sequence.
    """
    try:
        found = None if isinstance(value, TEXT_OR_PAIRS) else tuple(value)
    except (TypeError, ValueError):  # what has no elements, or too many dimensions
        found = None
    if found is None or len(found) < least:
        size = f" of at least {least}" if least else ""
        raise BadInput(f"{name} must be a sequence{size}, not {shown(value)}")
    for each in found:
        if not isinstance(each, of):
            raise BadInput(f"{name} must hold {of.__name__}s only, not {shown(each)}")
    return found


def a_text(name: str, value: object) -> str:
    """``value``, or `BadInput` naming ``name`` when it is no string, or an empty one."""
    if not isinstance(value, str) or not value:
        raise BadInput(f"{name} must be a string of at least one character, not {shown(value)}")
    return value


def a_path(name: str, value: object) -> str:
    """``value``, a path or its text, as text; `BadInput` naming ``name`` for anything else, and for
    a text with a character that no path can have.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise BadInput(f"{name} must be a name or a path, not {shown(value)}")
    return text


def a_key(name: str, value: object) -> Hashable:
    """``value``, or `BadInput` naming ``name`` when no dict can have it as a key."""
    try:
        hash(value)
    except Exception:
        raise BadInput(f"{name} must be a name, not {shown(value)}") from None
    return value


def seconds(name: str, value: object) -> float:
    """``value`` as a float, or `BadInput` naming ``name`` when it is no finite number."""
    number = real(value)
    if not math.isfinite(number):
        raise BadInput(f"{name} must be seconds on the engine's clock, not {shown(value)}")
    return number


def token_ids(
    name: str, tokens: object, vocabulary: int, in_any_order: bool = False
) -> tuple[int, ...]:
    """Token ids as plain ints (NumPy's and MLX's are welcome), or `BadInput` naming ``name``. What
    has no order, or holds characters or bytes, is refused by its kind.
    """
    if isinstance(tokens, NO_TOKEN_IDS) and not (in_any_order and isinstance(tokens, Set)):
        raise BadInput(
            f"{name} must be a sequence of token ids in order, not a {type(tokens).__name__}: "
            f"{shown(tokens)}"
        )
    try:
        given = list(tokens.tolist() if hasattr(tokens, "tolist") else tokens)
    except TypeError:
        raise BadInput(f"{name} must be a sequence of token ids, not {shown(tokens)}") from None
    found = []
    for token in given:
        try:
            number = -1 if isinstance(token, bool) else index(token)
        except (TypeError, ValueError):  # an array of other than one whole number raises either
            number = -1
        if not 0 <= number < vocabulary:
            raise BadInput(
                f"{name} has token {shown(token)}, but tokens are whole numbers from 0 to "
                f"{vocabulary - 1}"
            )
        found.append(number)
    return tuple(found)


def shown(value: object, longest: int = 160) -> str:
    """``value`` as text for a message: one line of at most ``longest`` characters."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # of the value's own class, or an integer of too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= longest else text[:longest] + "…"


def reason_of(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (_words(error).strip() or type(error).__name__).splitlines()[0]


def named(error: BaseException) -> str:
    """An error's type and text, for a message of one line."""
    return f"{type(error).__name__}: {shown(_words(error))}"


def is_own(error: BaseException) -> bool:
    """Whether an error is a function's own, and no interrupt of it. A panic in a library written in
    Rust, such as `tokenizers`, is own, but no `Exception`.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""


def one_of(kind: str, value: object, allowed) -> str:
    """``value``, or `BadInput` naming it and the ``allowed`` names when it is none of them."""
    if not isinstance(value, str) or value not in allowed:
        raise BadInput(f"unknown {kind} {shown(value)}: use one of {', '.join(sorted(allowed))}")
    return value


@contextmanager
def blamed_on(strategy: str) -> Iterator[None]:
    """Turn any exception of a user's own strategy into one `BadInput` that names ``strategy``."""
    try:
        yield
    except CortexLabError as error:
        if repr(strategy) in str(error):
            raise
        raise BadInput(f"strategy {strategy!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise BadInput(f"strategy {strategy!r} raised {named(error)}") from error
