"""What this package raises when a caller asks for something it cannot do: one line that names the value and what is allowed."""


class CortexLabError(Exception):
    """Base of every error this package raises on purpose."""


class BadInput(CortexLabError, ValueError):
    """An argument, a file or a request that cannot be used."""


class NotContiguous(CortexLabError):
    """One view was asked of a sequence whose tokens lie in several extents."""


class ModelError(BadInput):
    """A model that cannot be found, read or driven."""


def at_least(name: str, value: object, minimum: int) -> int:
    """``value`` as an int, or `BadInput` naming ``name`` when it is not a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise BadInput(f"{name} must be a whole number of at least {minimum}, not {value!r}")
    return value


def one_of(kind: str, value: object, allowed) -> None:
    """`BadInput` naming ``value`` and the ``allowed`` names, unless it is one of them."""
    if value not in allowed:
        raise BadInput(f"unknown {kind} {value!r}: use one of {', '.join(sorted(allowed))}")
