"""Requests played to an allocator: a script on a pool small enough to be looked at, or a stream
that keeps a pool busy.

    play("cortexstream", "a+5 b+3 c+4 b- a+2", 16)
                          |          |  '- a grows by two blocks
                          |          '- b leaves
                          '- a asks for five blocks

A refused event is left out, and the rest goes on. All strategies meet equal events.
"""

import heapq
import math
import random
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from ..allocators import Allocator, Extent, Stats, block_map, make_allocator, strategy_of
from ..errors import BadInput, shown

STEP = re.compile(r"([A-Za-z]\w*)(?:\+([1-9]\d*)|-)")


class Event(NamedTuple):
    """A request that asks for blocks, or leaves."""

    name: Hashable
    wanted: int  # blocks on top of those it holds; 0: it leaves


def drive(
    allocator: Allocator, events: Iterable[Event]
) -> Iterator[tuple[Event, tuple[Extent, ...] | None]]:
    """Play ``events``; yield each, once done, with all extents of its request: None where it was
    refused (the request keeps what it held), none where it left.

    A request that holds nothing may leave: nothing changes.
    """
    live: dict[Hashable, tuple[Extent, ...]] = {}
    for event in events:
        name, wanted = event
        held = live.pop(name, ())
        if wanted:
            found = allocator.extend(held, wanted) if held else allocator.allocate(wanted)
            live[name] = held if found is None else found
        else:
            if held:
                allocator.free(held)
            found = ()
        yield event, found


# --- a script on a toy pool -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal:
    """A step that found no place, and the pool it met."""

    step: str
    wanted: int
    free_blocks: int
    largest_free_run: int

    def __str__(self) -> str:
        longest = f", longest {self.largest_free_run}" if self.free_blocks >= self.wanted else ""
        return f"{self.step} ({self.free_blocks} free{longest})"


@dataclass(slots=True)
class Toy:
    """How a pool lies after a script, and what it refused on the way.

    Sequences stand in order of arrival, also those that have left, so each keeps its letter.
    """

    strategy: str
    num_blocks: int
    # blocks asked for, less those refused; 0 once the sequence has left
    asked: dict[str, int] = field(default_factory=dict)
    owners: dict[str, tuple[Extent, ...]] = field(default_factory=dict)  # extents by sequence
    refused: list[Refusal] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    @property
    def spare_blocks(self) -> int:
        """Blocks handed out beyond those asked for."""
        return self.stats["used_blocks"] - sum(self.asked.values())

    @property
    def num_extents(self) -> int:
        return sum(map(len, self.owners.values()))

    @property
    def verdict(self) -> str:
        return "refused: " + ", ".join(map(str, self.refused)) if self.refused else "all served"

    def text(self) -> str:
        """The strategy, its block map, and what it refused."""
        row = block_map(self.owners, self.num_blocks, width=self.num_blocks)[2:]
        return f"{self.strategy:20}{row}  {self.verdict}"


def play(strategy: str | Callable[[int], Allocator], script: str, num_blocks: int) -> Toy:
    """``script`` under one strategy. A region of ``static`` is the largest request, rounded up to a
    power of two.

    `BadInput` for a step that cannot be read, or in which a sequence leaves that never came.
    """
    events = [_parsed(step) for step in script.split()]
    pool = _pool(strategy, num_blocks, max((event.wanted for event in events), default=1))
    toy = Toy(strategy_of(strategy).name, num_blocks)
    for (name, wanted), extents in drive(pool, events):
        if not wanted:
            if name not in toy.owners:
                raise BadInput(f"{name}- in the script: {name} has not come")
            toy.owners[name], toy.asked[name] = (), 0
        elif extents is None:
            toy.owners.setdefault(name, ())
            toy.asked.setdefault(name, 0)
            free, longest = (pool.stats()[key] for key in ("free_blocks", "largest_free_run"))
            toy.refused.append(Refusal(f"{name}+{wanted}", wanted, free, longest))
        else:
            toy.owners[name] = extents
            toy.asked[name] = toy.asked.get(name, 0) + wanted
    pool.check()
    toy.stats = pool.stats()
    return toy


def _parsed(step: str) -> Event:
    """``a+5`` or ``a-``."""
    found = STEP.fullmatch(step)
    if found is None:
        raise BadInput(f"a step of a script is like a+5 or a-, not {shown(step)}")
    return Event(found[1], int(found[2] or 0))


def _pool(
    strategy: str | Callable[[int], Allocator], num_blocks: int, largest_request: int
) -> Allocator:
    region_blocks = 1 << (largest_request - 1).bit_length()
    return make_allocator(strategy, num_blocks, region_blocks=region_blocks)


# --- requests that come and go --------------------------------------------------------------------


def churn(
    strategy: str | Callable[[int], Allocator],
    *,
    num_blocks: int = 256,
    num_requests: int = 2000,
    sizes: tuple[int, int] = (1, 64),
    load: float = 1.0,
    seed: int = 0,
) -> dict:
    """What a pool refuses and wastes while requests come and go that ask for ``load`` times its
    blocks on average (`coming_and_going`); a refused request does not come back.

    ``refused_with_room``: refusals although enough blocks were free. ``partial``: refusals that
    changed the pool. ``spare_share``: share of held blocks that no request asked for, over all
    arrivals. ``extents``: mean number a request got.
    """
    pool = _pool(strategy, num_blocks, sizes[1])
    before, asked, arrivals = pool.stats(), {}, []
    for (name, wanted), extents in drive(
        pool, coming_and_going(num_requests, sizes, load * num_blocks / fmean(sizes), seed)
    ):
        after, refused = pool.stats(), extents is None
        if wanted and not refused:
            asked[name] = wanted
        else:
            asked.pop(name, None)
        if wanted:
            arrivals.append(
                {
                    "refused": refused,
                    "refused_with_room": refused and before["free_blocks"] >= wanted,
                    "partial": refused and after != before,
                    "extents": 0 if refused else len(extents),
                    "used_blocks": after["used_blocks"],
                    "asked_blocks": sum(asked.values()),
                }
            )
        before = after
    pool.check()
    return {"strategy": strategy_of(strategy).name} | _totals(arrivals)


def coming_and_going(
    num_requests: int, sizes: tuple[int, int], mean_stay: float, seed: int
) -> Iterator[Event]:
    """One request a step, of ``sizes`` evenly spread; each leaves after an exponential time,
    ``mean_stay`` steps on average.
    """
    rng, leaving = random.Random(seed), []  # leaving: a heap of (step, number of the request)
    for number in range(num_requests):
        while leaving and leaving[0][0] <= number:
            yield Event(heapq.heappop(leaving)[1], 0)
        yield Event(number, rng.randint(*sizes))
        heapq.heappush(leaving, (number + rng.expovariate(1 / mean_stay), number))


def _totals(arrivals: list[dict]) -> dict:
    total = {name: sum(arrival[name] for arrival in arrivals) for name in arrivals[0]}
    num_requests, used = len(arrivals), total["used_blocks"]
    num_served = num_requests - total["refused"]
    return {
        "requests": num_requests,
        "refused": total["refused"],
        "refused_share": total["refused"] / num_requests,
        "refused_with_room": total["refused_with_room"],
        "refused_with_room_share": total["refused_with_room"] / num_requests,
        "partial": total["partial"],
        "spare_share": 1 - total["asked_blocks"] / used if used else 0.0,
        "extents": total["extents"] / num_served if num_served else math.nan,
    }
