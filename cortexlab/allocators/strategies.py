"""The table of strategies, and how names become allocators. A strategy is a named pair of placement
and growth.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from .. import errors
from ..errors import BadInput, a_sequence, at_least, one_of
from .base import Allocator
from .buddy import Buddy
from .contiguous import BestFit, FirstFit, Segregated
from .cortexstream_buddy import CortexStreamBuddy
from .paged import Paged
from .runs import Runs
from .static import Static

GROWTHS = ("reserve", "relocate", "chain")  # what happens when a sequence outgrows its extents
DEFAULT_REGIONS = 8  # regions of a static pool where no region size is given


@dataclass(frozen=True, slots=True)
class Strategy:
    """``placement`` says where blocks go (a class of this package, or a user's factory), ``growth``
    what happens when a sequence outgrows its extents (one of `GROWTHS`).
    """

    name: str
    placement: Callable[..., Allocator]
    growth: str

    @property
    def gives_front(self) -> bool:
        """Whether an allocation can give its first blocks back and go on wherever one is free."""
        in_place = {each.placement for each in STRATEGIES.values() if each.growth != "chain"}
        gives = hasattr(self.placement, "release_front") and self.placement not in in_place
        return self.growth == "chain" and gives


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("static", Static, "reserve"),
        Strategy("cortexstream", FirstFit, "reserve"),
        Strategy("best_fit", BestFit, "relocate"),
        Strategy("segregated", Segregated, "relocate"),
        Strategy("buddy", Buddy, "relocate"),
        Strategy("cortexstream_buddy", CortexStreamBuddy, "reserve"),
        Strategy("paged", Paged, "chain"),
        Strategy("runs", Runs, "chain"),
    )
}
PLACEMENTS = {"first_fit": FirstFit}  # placements that no strategy is named after


def strategy_of(strategy: str | Callable[[int], Allocator], growth: str | None = None) -> Strategy:
    """The strategy of a name or a factory. ``growth`` overrides the strategy's own, which is
    ``chain`` for a factory. `BadInput` for an unknown name or growth.
    """
    if callable(strategy):
        found = Strategy(getattr(strategy, "__name__", type(strategy).__name__), strategy, "chain")
    else:
        one_of("strategy", strategy, STRATEGIES)
        found = STRATEGIES[strategy]
    if growth is None:
        return found
    one_of("growth", growth, GROWTHS)
    return Strategy(found.name, found.placement, growth)


def blamed_on(strategy: str | Callable[[int], Allocator]) -> AbstractContextManager:
    """`errors.blamed_on` for a user's factory; a context that does nothing for a name of this
    package, whose failures are ours.
    """
    return errors.blamed_on(strategy_of(strategy).name) if callable(strategy) else nullcontext()


def check_names(strategies: Sequence[str | Callable[[int], Allocator]]) -> list[str]:
    """The strategies' names. `BadInput` when there is none, or when two have one name, since their
    rows could not be told apart.
    """
    strategies = a_sequence("strategies", strategies, least=1)
    names = [
        strategy if isinstance(strategy, str) else strategy_of(strategy).name
        for strategy in strategies
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(
            f"strategy {twice[0]!r} is named twice: each may stand once, and a factory needs a "
            "name of its own"
        )
    if taken := [
        strategy
        for strategy in strategies
        if callable(strategy) and strategy_of(strategy).name in STRATEGIES
    ]:
        raise BadInput(
            f"strategy {strategy_of(taken[0]).name!r} is a name of this package: a factory needs a "
            "name of its own"
        )
    return names


def make_allocator(
    placement: str | Callable[[int], Allocator],
    num_blocks: int,
    *,
    region_blocks: int | None = None,
) -> Allocator:
    """An allocator over ``num_blocks`` blocks by the name of a placement or strategy, or by a
    factory.

    ``region_blocks`` is the region of ``static``, by default an eighth of the pool. Raises
    `BadInput` for an unknown name.
    """
    num_blocks = at_least("num_blocks", num_blocks, 1)
    if not callable(placement):
        one_of("placement", placement, PLACEMENTS | STRATEGIES)
        placement = PLACEMENTS.get(placement) or STRATEGIES[placement].placement
    if placement is Static:
        return Static(
            num_blocks,
            max(1, num_blocks // DEFAULT_REGIONS) if region_blocks is None else region_blocks,
        )
    allocator = placement(num_blocks)
    if not isinstance(allocator, Allocator):
        raise BadInput(
            f"{placement!r} made {type(allocator).__name__}, which lacks a part of "
            "cortexlab.Allocator"
        )
    return allocator
