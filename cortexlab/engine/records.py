"""What an engine tells of itself: of a step its times, tokens and blocks held; statistics."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..allocators import Extent, Stats
from ..scheduler.request import Request
from ..scheduler.scheduler import Schedule, Scheduler
from .kv_cache import KVCache


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


def before_step(scheduler: Scheduler, step: Schedule) -> dict:
    """The fields of a `StepRecord` that are known when its step is planned."""
    blocks = scheduler.blocks
    return {
        "num_running": len(scheduler.running),
        "num_waiting": len(scheduler.waiting),
        "unusable_slots": step.unusable_blocks * blocks.block_size,
        "pool": blocks.stats(),
        "held": tuple(holdings(scheduler.running, blocks.block_size)),
    }


@dataclass(slots=True)
class Done:
    """What an engine has done since its first step."""

    started_at: float | None = None
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0


def serving_stats(cache: KVCache, scheduler: Scheduler, done: Done, now: float) -> Stats:
    """What `Engine.stats` returns."""
    elapsed = now - done.started_at if done.started_at is not None else math.nan
    blocks = cache.blocks
    size, num_held = blocks.block_size, blocks.num_held
    held, unusable = num_held * size, scheduler.unusable_blocks * size
    tokens = sum(request.num_computed for request in scheduler.running) - blocks.shared_tokens
    room, asked = held + unusable, scheduler.num_prefix_ids
    prefills, decodes = done.num_prefill_tokens, done.num_decode_tokens
    return Stats(
        cache.stats(),
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_preemptions=scheduler.num_preemptions,
        num_swapped=len(cache.swap.tables) if cache.swap else 0,
        num_steps=done.num_steps,
        num_prefill_tokens=prefills,
        num_decode_tokens=decodes,
        prefill_tokens_per_s=prefills / elapsed if elapsed > 0 else None,
        decode_tokens_per_s=decodes / elapsed if elapsed > 0 else None,
        occupancy=num_held / blocks.num_blocks,
        token_share=tokens / room if room else None,
        empty_share=(held - tokens) / room if room else None,
        external_share=unusable / room if room else None,
        prefix_hit_rate=scheduler.num_found_ids / asked if asked else None,
    )
