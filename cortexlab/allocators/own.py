"""A user's own strategies by name: ``module:Factory``."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from ..errors import BadInput, reason_of, shown
from .base import Allocator
from .strategies import make_allocator


def own_strategy(name: str, folders: Sequence[str | Path] = ()) -> Callable[[int], Allocator]:
    """The factory that ``module:Factory`` names; the module is looked for in ``folders``, then in
    the current folder, then where Python looks. `BadInput` where it makes no allocator.
    """
    module, _, attribute = name.partition(":")
    before = sys.path[:]
    sys.path[:0] = [*map(str, folders), os.getcwd()]
    try:
        factory = getattr(import_module(module), attribute)
        make_allocator(factory, 64)
    except (Exception, SystemExit) as error:  # the user's module may do anything
        reason = reason_of(error)[:200]
        raise BadInput(f"cannot use strategy {shown(name)}: {reason}") from error
    finally:  # what the module imports later is found, but shadows nothing
        sys.path[:] = [*before, *(str(each) for each in folders if str(each) not in before)]
    return factory


def own_source(name: str) -> bytes:
    """The content of the file that ``module:Factory`` was loaded from, without what it imports;
    empty where it has none.
    """
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return Path(file).read_bytes() if file else b""
