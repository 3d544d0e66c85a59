"""What this package raises when a caller asks for something it cannot do: one line that names the
value and what is allowed.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class CortexLabError(Exception):
    """Base of every error this package raises on purpose."""


class BadInput(CortexLabError, ValueError):
    """An argument, a file or a request that cannot be used."""


class NotContiguous(CortexLabError):
    """One view was asked of a sequence whose tokens lie in several extents."""


class ModelError(BadInput):
    """A model that cannot be found, read or driven."""


MAX_COUNT = 2**31 - 1  # of blocks, tokens, requests: MLX's shapes are 32-bit


def at_least(name: str, value: object, minimum: int, maximum: int = MAX_COUNT) -> int:
    """``value``, or `BadInput` naming ``name`` when it is not a whole number from ``minimum`` to
    ``maximum``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        limit = (
            f"at most {maximum}"
            if isinstance(value, int) and value > maximum
            else f"at least {minimum}"
        )
        raise BadInput(f"{name} must be a whole number of {limit}, not {shown(value)}")
    return value


def yes_or_no(name: str, value: object) -> bool:
    """``value``, or `BadInput` naming ``name`` when it is neither True nor False."""
    if not isinstance(value, bool):
        raise BadInput(f"{name} must be True or False, not {shown(value)}")
    return value


def shown(value: object, longest: int = 160) -> str:
    """``value`` as a message names it: cut, and on one line."""
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + "…"


def one_of(kind: str, value: object, allowed) -> None:
    """`BadInput` naming ``value`` and the ``allowed`` names, unless it is one of them."""
    if not isinstance(value, str) or value not in allowed:
        raise BadInput(f"unknown {kind} {shown(value)}: use one of {', '.join(sorted(allowed))}")


@contextmanager
def blamed_on(strategy: str) -> Iterator[None]:
    """What a strategy of the user's own raises, or a promise it breaks, becomes one line that names
    it.
    """
    try:
        yield
    except CortexLabError as error:
        if repr(strategy) in str(error):
            raise
        raise BadInput(f"strategy {strategy!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise BadInput(
            f"strategy {strategy!r} raised {type(error).__name__}: {shown(str(error))}"
        ) from error
