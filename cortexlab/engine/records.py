"""What an engine tells of itself: of a step its times, tokens and blocks held; statistics."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..allocators import Extent, Stats
from ..scheduler.block_manager import BlockManager
from ..scheduler.request import Request
from ..scheduler.scheduler import Schedule, Scheduler
from .kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Held:
    """What one sequence held during a step, in one group of layers. At the end of this hold it had
    the request's ``fills[hold]`` tokens; ``num_counted`` first slots are shared, and counted with
    another; ``num_skipped`` tokens before the first slot are gone. Of a slot's layers,
    ``layer_share`` are in use.
    """

    request_id: str
    hold: int  # 0 at the first admission, one more after each preemption
    extents: tuple[Extent, ...]
    num_slots: int
    num_tokens: int
    num_counted: int = 0
    num_skipped: int = 0
    layer_share: float = 1


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


def holdings(running: Iterable[Request], blocks: BlockManager) -> Iterator[Held]:
    """What each running request holds now, by group."""
    seen = set()
    for request in running:
        for part, layer_share in zip(request.table.parts, blocks.layer_shares, strict=True):
            counted = 0
            for block in part.shared:
                counted += block in seen
                seen.add(block)
            yield Held(
                request.id, len(request.fills), part.all_extents, part.capacity, part.num_tokens,
                counted * blocks.block_size, part.skipped, layer_share,
            )  # fmt: skip


def before_step(scheduler: Scheduler, step: Schedule) -> dict:
    """The fields of a `StepRecord` that are known when its step is planned."""
    blocks = scheduler.blocks
    return {
        "num_running": len(scheduler.running),
        "num_waiting": len(scheduler.waiting),
        "unusable_slots": step.unusable_blocks * blocks.block_size,
        "pool": blocks.stats(),
        "held": tuple(holdings(scheduler.running, blocks)),
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
    tokens = sum(
        (each.num_tokens - each.num_counted) * each.layer_share
        for each in holdings(scheduler.running, blocks)
    )
    room, asked = held + unusable, scheduler.num_prefix_ids
    prefills, decodes = done.num_prefill_tokens, done.num_decode_tokens
    return Stats(
        cache.stats(),
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_preemptions=scheduler.num_preemptions,
        num_swapped=len(cache.swap.sequences) if cache.swap else 0,
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
