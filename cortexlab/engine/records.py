"""What an engine tells of a step: times, tokens, and the blocks held."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..allocators import Extent, Stats
from ..scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Held:
    """What one sequence held during a step. At the end of this hold it had filled the request's
    ``fills[hold]`` slots; ``num_counted`` first slots are shared, and counted with another.
    """

    request_id: str
    hold: int  # 0 at the first admission, one more after each preemption
    extents: tuple[Extent, ...]
    num_slots: int
    num_tokens: int
    num_counted: int = 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it was run; times are seconds on the engine's clock. ``host_s``: scheduling,
    block tables, plans.
    """

    started_at: float
    ended_at: float
    host_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    unusable_slots: int
    pool: Stats
    copied_bytes: int
    held: tuple[Held, ...]


def holdings(running: Iterable[Request], block_size: int) -> Iterator[Held]:
    """What each running request holds now."""
    seen = set()
    for request in running:
        table, counted = request.table, 0
        for block in table.shared:
            counted += block in seen
            seen.add(block)
        yield Held(
            request.id,
            len(request.fills),
            table.all_extents,
            table.capacity,
            table.num_tokens,
            counted * block_size,
        )
