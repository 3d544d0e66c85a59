"""What CortexStream's documents claim of its KV cache. Each claim is measured, and its verdict
computed from the measurement.

Source: github.com/pythongiant/CortexStream at f8c8b1f, or at the commit a source names. A claim is
tried in several cases. The verdict is `holds` where all cases hold, `does not hold` where none
does, else `holds only with` the cases that hold.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import mlx.core as mx
import numpy as np
import pandas as pd

from ..allocators import STRATEGIES, make_allocator
from ..bench.allocator_cost import measure, pool_of, with_turnover
from ..bench.measure import in_turn
from ..engine.arena import Arena, LayerShape
from ..replay import replay
from ..workloads.synthetic import make_workload
from .cortexstream_cache import KVCache
from .play import churn

DESIGN = "docs/KV_CACHE_DESIGN.md"
API = "docs/KV_CACHE_API_REFERENCE.md"
IMPLEMENTATION = "KV_CACHE_IMPLEMENTATION.md"
TRITON = "docs/TRITON_COMPARISON.md"
SUMMARY = "KV_CACHE_EXECUTIVE_SUMMARY.md (e65c742)"  # the commit after f8c8b1f
# the "7B model" of those documents
LAYERS, HEADS, HEAD_DIM, TOKENS, BLOCK_SIZE = 32, 32, 64, 32_768, 16
BLOCKS, SEQUENCE_BLOCKS = TOKENS // BLOCK_SIZE, 32
UNITS = {"GB": 1e9, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Claim:
    """What a document says, what was measured, and in which cases it holds."""

    quote: str
    source: str
    measured: str
    cases: dict[str, bool]

    @property
    def verdict(self) -> str:
        held = [case for case, holds in self.cases.items() if holds]
        if len(held) == len(self.cases):
            return "holds"
        return f"holds only with {', '.join(held)}" if held else "does not hold"


def markdown_table(claims: Iterable[Claim]) -> str:
    lines = ["| claim | in | measured here | verdict |", "| --- | --- | --- | --- |"]
    lines += [
        f"| “{claim.quote}” | {claim.source} | {claim.measured} | **{claim.verdict}** |"
        for claim in claims
    ]
    return "\n".join(lines)


# --- refusals -------------------------------------------------------------------------------------


def no_fragmentation(num_requests: int = 2000, seed: int = 0) -> Claim:
    mixed = churn("cortexstream", num_requests=num_requests, seed=seed)["refused_with_room"]
    alike = churn(
        "cortexstream",
        num_requests=num_requests,
        sizes=(SEQUENCE_BLOCKS, SEQUENCE_BLOCKS),
        seed=seed,
    )["refused_with_room"]
    return Claim(
        "No fragmentation (contiguous block invariant)",
        f"{DESIGN}:8",
        f"refused with enough blocks free: {mixed:,} of {num_requests:,} requests of 1 to 64 "
        f"blocks, {alike:,} of {num_requests:,} of {SEQUENCE_BLOCKS}",
        {"requests of mixed sizes": not mixed, "requests of one size": not alike},
    )


def free_blocks_join() -> Claim:
    """Single blocks fill the pool and every other one leaves; then all leave."""
    pool = make_allocator("cortexstream", BLOCKS)
    held = [pool.allocate(1) for _ in range(BLOCKS)]
    runs = {}
    for leaving, case in ((held[::2], "half of them gone"), (held[1::2], "all gone")):
        for extents in leaving:
            pool.free(extents)
        stats = pool.stats()
        runs[case] = stats["largest_free_run"], stats["free_blocks"]
    return Claim(
        "Any N free blocks will eventually form a contiguous region",
        f"{DESIGN}:117",
        f"{BLOCKS:,} sequences of one block: "
        + ", ".join(
            f"{case}, longest run {run:,} of {free:,} free" for case, (run, free) in runs.items()
        ),
        {case: run == free for case, (run, free) in runs.items()},
    )


def no_partial_allocation(num_requests: int = 2000, seed: int = 0) -> Claim:
    row = churn("cortexstream", num_requests=num_requests, seed=seed)
    return Claim(
        "No partial allocation",
        f"{DESIGN}:127",
        f"{row['partial']:,} of {row['refused']:,} refusals changed which blocks are free",
        {"first fit": not row["partial"]},
    )


def concurrent_sequences() -> Claim:
    counts = {}
    for strategy in ("cortexstream", "buddy", "cortexstream_buddy"):
        pool = make_allocator(strategy, BLOCKS)
        counts[strategy] = 0
        while pool.allocate(SEQUENCE_BLOCKS) is not None:
            counts[strategy] += 1
    promised = BLOCKS // SEQUENCE_BLOCKS
    return Claim(
        f"{BLOCKS} blocks, {SEQUENCE_BLOCKS} blocks per sequence = {promised} concurrent",
        f"{SUMMARY}:202",
        ", ".join(f"{count} under `{name}`" for name, count in counts.items()),
        {f"`{name}`": count == promised for name, count in counts.items()},
    )


def published_scan(free: Sequence[bool], wanted: int) -> tuple[int | None, int]:
    """``findContiguousFreeRegion`` (src/cache/kv_cache.cpp:50), step by step: the region's first
    block, and the number of blocks looked at.
    """
    count, start = 0, None
    for at in range(len(free) + 1):
        if at < len(free) and free[at]:
            start = at if count == 0 else start
            count += 1
        elif count >= wanted:  # the published code compares only where a region ends
            return start, at + 1
        else:
            count, start = 0, None
    return None, len(free) + 1


def constant_time() -> Claim:
    sizes = BLOCKS, 16 * BLOCKS
    looked = [published_scan(bytes([1]) * size, SEQUENCE_BLOCKS)[1] for size in sizes]
    return Claim(
        "Predictable allocation (O(1) MVP, deterministic)",
        f"{DESIGN}:6",
        "its scan looks at "
        + ", ".join(
            f"{n:,} in an empty pool of {size:,}" for n, size in zip(looked, sizes, strict=True)
        ),
        {"its own scan": len(set(looked)) == 1},
    )


def memory_efficiency() -> Claim:
    items = make_workload("lognormal", 200, request_rate=2.0)
    used = {
        each.strategy.name: each.row["utilization"]
        for each in replay(items, ("cortexstream", "paged"), block_sizes=(BLOCK_SIZE,))
    }
    return Claim(
        "Memory efficiency … >95% (contiguous guarantee)",
        f"{TRITON}:98",
        "slots held that hold a token: "
        + ", ".join(f"{share:.1%} under `{name}`" for name, share in used.items()),
        {f"`{name}`": share > 0.95 for name, share in used.items()},
    )


# --- views ----------------------------------------------------------------------------------------


def published_view() -> Claim:
    """``getKView``: the first block's address and the shape ``[heads, tokens, dim]``, without
    strides, on an arena ``[blocks, heads, block, dim]``.
    """
    tokens = 10, BLOCK_SIZE, 2 * BLOCK_SIZE, 32 * BLOCK_SIZE
    heads, dim, num_blocks = 4, 8, 32
    arena = np.arange(num_blocks * heads * BLOCK_SIZE * dim).reshape(
        num_blocks, heads, BLOCK_SIZE, dim
    )
    truth = arena.transpose(1, 0, 2, 3).reshape(heads, -1, dim)
    shares = {
        n: float((arena.ravel()[: heads * n * dim].reshape(heads, n, dim) == truth[:, :n]).mean())
        for n in tokens
    }
    return Claim(
        "`getKView()` … O(1) … Pointer arithmetic only",
        f"{IMPLEMENTATION}:244",
        "values that lie where the view says: "
        + ", ".join(f"{share:.0%} of {n} tokens" for n, share in shares.items()),
        {
            "one full block" if n == BLOCK_SIZE else f"{n} tokens": share == 1
            for n, share in shares.items()
        },
    )


def zero_copy() -> Claim:
    """Bytes that MLX copies to read K of a sequence of 1 to 32 blocks as ``[heads, tokens, dim]``,
    from both layouts.
    """
    num_blocks, heads, dim = (1, 2, 8, 32), 4, 32
    first, pool = 3, max(num_blocks) + 5
    blocked = mx.zeros((2, pool, heads, BLOCK_SIZE, dim))
    head_major = mx.zeros((heads, pool * BLOCK_SIZE, dim))
    copied = {"blocked": [], "head-major": []}
    for k in num_blocks:
        read = (
            blocked[1, first : first + k].transpose(1, 0, 2, 3).reshape(heads, k * BLOCK_SIZE, dim)
        )
        copied["blocked"].append(copied_bytes(read, blocked))
        copied["head-major"].append(
            copied_bytes(head_major[:, first * BLOCK_SIZE : (first + k) * BLOCK_SIZE], head_major)
        )
    moved = " / ".join(f"{count // 1024}" for count in copied["blocked"])
    cases = {
        f"{k} block{'s' * (k > 1)}": not count
        for k, count in zip(num_blocks, copied["blocked"], strict=True)
    }
    return Claim(
        "Zero-copy per token (direct arena references)",
        f"{DESIGN}:7, layout :39",
        f"`[layers, blocks, heads, block, dim]` copies {moved} KiB to read "
        f"{' / '.join(map(str, num_blocks))} blocks in MLX; "
        f"`[heads, slots, dim]` {sum(copied['head-major']) // 1024}",
        cases | {"`[heads, slots, dim]`": not any(copied["head-major"])},
    )


def copied_bytes(read, arena) -> int:
    """Bytes of ``read``, which was read from ``arena``, if it lies outside the arena's memory; 0
    for a view.
    """
    mx.eval(read, arena)
    at, start = (
        np.array(array, copy=False).__array_interface__["data"][0] for array in (read, arena)
    )
    return 0 if start <= at < start + arena.nbytes else read.nbytes


# --- bytes ----------------------------------------------------------------------------------------


def total_memory(quote: str, source: str, claimed: str) -> Claim:
    """``claimed``, such as "17.2", against the arena of this package for that model, by type and
    unit.
    """
    shape = LayerShape(HEADS, HEAD_DIM, HEAD_DIM)
    sizes = {
        kind: Arena([shape] * LAYERS, TOKENS, getattr(mx, kind)).nbytes
        for kind in ("float32", "float16")
    }
    digits = len(claimed.partition(".")[2])
    return Claim(
        quote,
        source,
        ", ".join(
            f"{kind} {size / UNITS['GB']:.1f} GB = {size / UNITS['GiB']:.1f} GiB"
            for kind, size in sizes.items()
        ),
        {
            f"{kind} in {unit}": f"{size / UNITS[unit]:.{digits}f}" == claimed
            for kind, size in sizes.items()
            for unit in UNITS
        },
    )


# --- all of them ----------------------------------------------------------------------------------


def counted_claims(num_requests: int = 2000, seed: int = 0) -> dict[str, Claim]:
    """The claims that are counted, not timed: equal figures on every machine."""
    return {
        "no fragmentation": no_fragmentation(num_requests, seed),
        "free blocks join": free_blocks_join(),
        "no partial allocation": no_partial_allocation(num_requests, seed),
        "64 sequences": concurrent_sequences(),
        "constant time": constant_time(),
        "memory efficiency": memory_efficiency(),
        "views": published_view(),
        "zero copy": zero_copy(),
        "17.2 GB": total_memory(
            "17.2 GB for K+V combined", f"{API}, Memory Calculation Examples", "17.2"
        ),
        "16.8 GB": total_memory("Total = 16.8 GB (K+V)", f"{IMPLEMENTATION}:100", "16.8"),
    }


# --- microseconds ---------------------------------------------------------------------------------


def allocation_times(strategy: str) -> tuple[float, float]:
    """Median microseconds of one `allocate` and of one `free` while sequences of 32 blocks fill a
    pool and leave in random order.
    """
    pool, rng, live = make_allocator(strategy, BLOCKS), random.Random(0), []
    num_sequences = BLOCKS // SEQUENCE_BLOCKS

    def allocate():
        live.extend(pool.allocate(SEQUENCE_BLOCKS) for _ in range(num_sequences))

    def free():
        while live:
            pool.free(live.pop())

    works = {"allocate": allocate, "shuffle": lambda: rng.shuffle(live), "free": free}
    seconds = in_turn(works, 200)
    return tuple(median(seconds[work]) / num_sequences * 1e6 for work in ("allocate", "free"))


def token_time() -> float:
    """Median microseconds of `KVCache.append_token` and `get_k_view` of one layer, together."""
    num_tokens = 500
    cache = KVCache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        max_total_tokens=2048,
        block_size=BLOCK_SIZE,
        strategy="cortexstream",
    )
    cache.allocate_for("a", 1, max_tokens=num_tokens + 2)  # prompt and warm-up: a token each

    def token():
        cache.append_token("a")
        cache.get_k_view("a", 0)

    (seconds,) = in_turn({"token": token}, num_tokens).values()
    return median(seconds) * 1e6


def timed_claims() -> dict[str, Claim]:
    """The claims in microseconds, which depend on the machine. CortexStream's are of C++, the
    figures measured here of Python.
    """
    times = {name: allocation_times(name) for name in ("cortexstream", "buddy", "paged")}
    told = [
        ", ".join(f"{times[name][which]:.1f} µs under `{name}`" for name in times)
        for which in (0, 1)
    ]
    per_token = token_time()
    return {
        "allocate": Claim(
            "For 2048 blocks on modern CPU: ~1-2 microseconds",
            f"{API}, Allocation Performance",
            told[0],
            {f"`{name}`": allocate <= 2 for name, (allocate, _) in times.items()},
        ),
        "free": Claim(
            "free … 32 blocks: <1 µs",
            f"{SUMMARY}:180",
            told[1],
            {f"`{name}`": free < 1 for name, (_, free) in times.items()},
        ),
        "buddy": Claim(
            "Future: Buddy allocator O(log totalBlocks) = ~10 microseconds",
            f"{API}, Allocation Performance",
            f"{times['buddy'][0]:.1f} µs",
            {"`buddy`": times["buddy"][0] <= 10},
        ),
        "token": Claim(
            "Total per-token overhead: <1 microsecond",
            f"{API}, Zero-Copy Performance",
            f"{per_token:.1f} µs for both",
            {"this package": per_token < 1},
        ),
    }


def costs(sizes: Sequence[int], seed: int = 0) -> pd.DataFrame:
    """`allocbench` of every strategy in half-full pools: its rows, and the cold `turnover` as one
    more operation.
    """
    makers = {name: partial(pool_of, name) for name in STRATEGIES}
    return pd.DataFrame(with_turnover(*measure(makers, sizes, (0.5,), SEQUENCE_BLOCKS, seed)))
