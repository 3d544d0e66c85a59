"""A pool small enough to be looked at: one script of requests, played to any strategy.

    play("cortexstream", "a+5 b+3 c+4 b- a+2", 16)
                          |          |  '- a grows by two blocks
                          |          '- b leaves
                          '- a asks for five blocks

What is refused is left out, and the script goes on.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ..allocators import Allocator, Extent, Stats, block_map, make_allocator, strategy_of
from ..errors import BadInput, shown

STEP = re.compile(r"([A-Za-z]\w*)(?:\+([1-9]\d*)|-)")


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
    """How a pool lies after a script, and what it refused on the way."""

    strategy: str
    num_blocks: int
    asked: dict[str, int] = field(
        default_factory=dict
    )  # blocks that a sequence asked for and holds; 0 once it has left
    owners: dict[str, tuple[Extent, ...]] = field(
        default_factory=dict
    )  # in order of arrival, so that letters stay
    refused: list["Refusal"] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    @property
    def spare_blocks(self) -> int:
        """Handed out beyond what was asked for."""
        return self.stats["used_blocks"] - sum(self.asked.values())

    @property
    def num_extents(self) -> int:
        """Of the sequences there are."""
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

    `BadInput` for a step that cannot be read, or of a sequence that is not there. What is refused
    is noted and left out.
    """
    steps = [_parsed(step) for step in script.split()]
    region = 1 << (max((wanted for _, wanted in steps), default=1) - 1).bit_length()
    pool = make_allocator(strategy, num_blocks, region_blocks=region)
    toy = Toy(strategy_of(strategy).name, num_blocks)
    for name, wanted in steps:
        held = toy.owners.get(name, ())
        if not wanted:
            if held:
                pool.free(held)
            elif name not in toy.owners:
                raise BadInput(f"{name}- in the script: {name} has not come")
            toy.owners[name], toy.asked[name] = (), 0
            continue
        found = pool.extend(held, wanted) if held else pool.allocate(wanted)
        toy.owners[name] = held if found is None else found
        toy.asked[name] = toy.asked.get(name, 0) + (0 if found is None else wanted)
        if found is None:
            stats = pool.stats()
            toy.refused.append(
                Refusal(f"{name}+{wanted}", wanted, stats["free_blocks"], stats["largest_free_run"])
            )
    pool.check()
    toy.stats = pool.stats()
    return toy


def _parsed(step: str) -> tuple[str, int]:
    """``("a", 5)`` for ``a+5``, ``("a", 0)`` for ``a-``."""
    found = STEP.fullmatch(step)
    if found is None:
        raise BadInput(f"a step of a script is like a+5 or a-, not {shown(step)}")
    return found[1], int(found[2] or 0)
