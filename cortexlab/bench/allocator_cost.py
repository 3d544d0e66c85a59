"""What bookkeeping costs: microseconds for allocate + free, extend and stats under each strategy,
beside vllm-mlx's block pool.

Why: a strategy that saves memory is of no use if deciding takes as long as computing. So its cost
must be small, and must stay what it is as the pool grows. How:

- *Aged pools.* A pool is filled until a request does not fit, with lognormal sizes (median
  ``request_blocks``), and emptied at random; it is then filled again, emptied to the occupancy and
  churned: half of its requests leave and others of their sizes come, two by two, and those that
  find no room wait. All of it scales with the pool, so one of any size is equally old. Where the
  request to be measured finds no room, others leave until it does. ``pools`` says how full each
  really was (the median of the rounds); one that does not come near the occupancy gives nulls.
- *Batches of about a millisecond*, so that the clock costs nothing. A row has the median and the
  99th percentile over batches of the time an operation took; the latter is null below 100 batches,
  of what is slow. The loop's and the clock's own time is subtracted.
- *Rounds.* Sizes, occupancies and strategies take turns, so a noisy neighbour hits all of them, and
  every round fills, empties and churns anew, so no figure hangs on one state of the free list.
  Python's garbage collector is off.
- ``allocate+free``: one request comes and goes, again and again, alone. That is the warm case: most
  strategies hand out again what was freed last, and one may keep it at hand, while the peer's queue
  walks on through its pool.
- ``extend``: the clock runs over one extension by a block, between allocate and free. Places
  without room behind them are held out of the way. Null where there is no other, and for strategies
  that never extend.
- ``stats``: allocate, stats, free, stats, less the pair timed beside it, halved: what is put off
  until somebody asks is counted too.
- ``turnover`` (in ``pools``): two requests leave at random, two of their sizes come, the larger
  first, which fits wherever free blocks are found and joined; the time a request. That is the cold
  case, and nearer to serving. It scrambles small pools more than large ones, so ``paged``, whose
  cost is the number of pieces, is dearest in small ones.

The peer is `PagedCacheManager` of vllm-mlx where that is installed. ``vllm-mlx`` calls the batched
functions that it documents, the fastest there are (`get_new_blocks`, `free_block_batch`),
``vllm-mlx-block`` one function a block, as its own engine does (`allocate_block`, `free_block`).
Nothing is in its prefix cache, so it evicts nothing.
"""

import argparse
import gc
import json
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib import metadata
from itertools import product, repeat
from statistics import median
from time import perf_counter_ns
from types import ModuleType

from tqdm import tqdm

from ..allocators import STRATEGIES, Allocator, strategy_of
from ..errors import BadInput, at_least, blamed_on, one_of, shown
from . import doctor
from .pools import PEERS, Pool, find_peer, peer_pool, pool_of

OPERATIONS = PAIR, EXTEND, STATS = "allocate+free", "extend", "stats"
TURNOVER = "turnover"
LARGEST_POOL = 1 << 22  # the peer takes half a kilobyte a block
AGEING = 1  # times that a pool is filled and emptied before the first round
ROUNDS, BATCHES = 5, 21  # of each operation, pool and occupancy: 105 batches
BATCH_NS, ROUND_NS = (
    1_000_000,
    150_000_000,
)  # what a batch should take; what the batches of one round may
FEWEST_FOR_P99 = 100
NEAR = 0.8  # of the occupancy asked for: what a pool must reach
WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join((*STRATEGIES, *PEERS))
    add(
        "--strategies",
        help=(
            f"comma-separated: {names}, or module:Factory of your own (default: all, the peer "
            "where installed)"
        ),
    )
    add("--num-blocks", default="2048,32768,1048576", help="comma-separated pool sizes, in blocks")
    add("--occupancy", default="0,0.5,0.9", help="comma-separated shares of the pool in use")
    add(
        "--request-blocks",
        type=int,
        default=32,
        help="blocks of the request that is measured, and median of the others",
    )
    add("--seed", type=int, default=0, help="of sizes and of what is freed")
    add("--json", action="store_true", help="print one JSON document and nothing else")


def run(
    args: argparse.Namespace, resolve: Callable[[str], Callable[[int], Allocator]] | None = None
) -> int:
    """Measure and print; the exit code. ``resolve`` gives the factory that a name
    ``module:Factory`` stands for.
    """
    peer = find_peer()
    strategies = _strategies(args.strategies, peer, resolve)
    sizes = [
        at_least("num-blocks", n, 1, LARGEST_POOL)
        for n in _numbers("num-blocks", args.num_blocks, int)
    ]
    at_least("request-blocks", args.request_blocks, 1, min(sizes))
    at_least("seed", args.seed, 0)
    occupancies = _numbers("occupancy", args.occupancy, float)
    if wrong := [share for share in occupancies if not 0 <= share < 1]:
        raise BadInput(f"occupancy must be numbers of at least 0 and below 1, not {wrong[0]}")
    total = len(sizes) * len(occupancies) * len(strategies) * ROUNDS
    with (
        tqdm(total=total, unit="round", file=sys.stderr, disable=None, leave=False) as bar,
        _no_collector(),
    ):
        rows, pools = measure(
            strategies, sizes, occupancies, args.request_blocks, args.seed, bar.update
        )
    document = {
        "environment": environment(peer),
        "rows": rows,
        "ratios": ratios(rows),
        "pools": pools,
    }
    print(
        json.dumps(document, allow_nan=False) if args.json else report(document),
        file=getattr(args, "stdout", sys.stdout),
    )
    return 0


# --- measuring ------------------------------------------------------------------------------------


def measure(
    makers: dict[str, Callable[[int], Pool]],
    sizes: Sequence[int],
    occupancies: Sequence[float],
    request_blocks: int,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> tuple[list[dict], list[dict]]:
    """Rows and ``pools``. `BadInput` names a strategy that raises or loses blocks."""
    pools, new, samples, used = {}, {}, defaultdict(list), defaultdict(list)
    for num_blocks, name in product(sizes, makers):
        with _blamed_on(name):
            pool = pools[num_blocks, name] = makers[name](num_blocks)
            new[num_blocks, name] = pool.free_blocks()
            pool.rng.seed(seed)
            for _ in range(AGEING):
                pool.fill(request_blocks)
                pool.thin(0)
    for index in range(ROUNDS):
        turn = index % len(pools)
        for num_blocks, name in [*pools, *pools][turn : turn + len(pools)]:
            pool = pools[num_blocks, name]
            with _blamed_on(name):
                pool.fill(request_blocks)
                for occupancy in sorted(occupancies, reverse=True):
                    pool.thin(occupancy)
                    pool.churn()
                    fits = pool.make_room(request_blocks)
                    used[name, num_blocks, occupancy].append(pool.used / num_blocks)
                    for operation, figures in (
                        _round(pool, request_blocks) if fits else {}
                    ).items():
                        samples[name, num_blocks, occupancy, operation] += figures
                    progress()
                pool.thin(0)
                free = pool.free_blocks()
                pool.check()
            if free != new[num_blocks, name]:
                raise BadInput(
                    f"strategy {name!r} loses blocks: {new[num_blocks, name]} were free, {free} "
                    "are when all are given back"
                )
    rows, states = [], []
    for num_blocks, name, occupancy in product(sizes, makers, occupancies):
        key = name, num_blocks, occupancy
        if (share := median(used[key])) < NEAR * occupancy:  # not the state that was asked for
            for operation in (*OPERATIONS, TURNOVER):
                samples[*key, operation].clear()
        where = {"strategy": name, "num_blocks": num_blocks, "occupancy": occupancy}
        for operation in OPERATIONS:
            rows.append(
                where
                | {"request_blocks": request_blocks, "operation": operation}
                | _summary(samples[*key, operation])
            )
        turnover = {
            f"{TURNOVER}_{name}": value for name, value in _summary(samples[*key, TURNOVER]).items()
        }
        states.append(where | {"used_share": share} | turnover)
    return rows, states


class NoRoom(Exception):
    """An extension found no room behind it, or a strategy none for two requests where two of their
    sizes had just left.
    """


def _round(pool: Pool, request_blocks: int) -> dict[str, list[float]]:
    """Microseconds an operation, one figure a batch, of a pool in which the request fits."""
    pair, asked = (
        _batch(_pairs, pool, request_blocks),
        _batch(_pairs_with_stats, pool, request_blocks),
    )
    found = {PAIR: [pair() for _ in _turns()], STATS: [(asked() - pair()) / 2 for _ in _turns()]}
    with pool.extensible(request_blocks) as extensible, suppress(NoRoom):
        if extensible:
            extend = _batch(_extends, pool, request_blocks)
            found[EXTEND] = [extend() for _ in _turns()]
    if len(pool.live) > 1:
        with suppress(NoRoom):
            turnover = _batch(_turnovers, pool, request_blocks)
            found[TURNOVER] = [turnover() / 2 for _ in _turns()]
        pool.live = [(held, asked) for held, asked in pool.live if held is not None]
        pool.used = sum(pool.size(held) for held, _ in pool.live)
    return found


def _turns() -> Iterator[None]:
    """`BATCHES` of them, or fewer when they take longer than `ROUND_NS`; one at least."""
    until = perf_counter_ns() + ROUND_NS
    for _ in range(BATCHES):
        yield
        if perf_counter_ns() > until:
            return


def _batch(
    work: Callable[[Pool, int, int], int], pool: Pool, request_blocks: int
) -> Callable[[], float]:
    """``work`` as many times as take `BATCH_NS`, doubled until that is near, which warms up too; it
    gives microseconds a time.
    """
    times = 1
    while True:
        started = perf_counter_ns()
        work(pool, request_blocks, times)
        if (spent := perf_counter_ns() - started) >= BATCH_NS / 2:
            break
        times *= 2
    times = max(1, round(times * BATCH_NS / spent))
    return lambda: work(pool, request_blocks, times) / (1000 * times)


def _pairs(pool: Pool, n: int, times: int) -> int:
    allocate, free = pool.allocate, pool.free
    started = perf_counter_ns()
    for _ in repeat(None, times):
        free(allocate(n))
    return perf_counter_ns() - started - _empty_loop(times)


def _pairs_with_stats(pool: Pool, n: int, times: int) -> int:
    allocate, free, stats = pool.allocate, pool.free, pool.stats
    started = perf_counter_ns()
    for _ in repeat(None, times):
        held = allocate(n)
        stats()
        free(held)
        stats()
    return perf_counter_ns() - started - _empty_loop(times)


def _extends(pool: Pool, n: int, times: int) -> int:
    allocate, extend, free, spent, clock = pool.allocate, pool.extend, pool.free, 0, 0
    for _ in repeat(None, times):
        held = allocate(n)
        started = perf_counter_ns()
        grown = extend(held, 1)
        ended = perf_counter_ns()
        if grown is None:
            free(held)
            raise NoRoom
        spent += ended - started
        clock += perf_counter_ns() - ended
        free(grown)
    return spent - clock


def _turnovers(pool: Pool, _: int, times: int) -> int:
    live, allocate, free = pool.live, pool.allocate, pool.free
    leaving = [
        sorted(pool.rng.sample(range(len(live)), 2), key=lambda at: -live[at][1])
        for _ in range(times)
    ]
    started = perf_counter_ns()
    for first, second in leaving:
        held, large = live[first]
        free(held)
        held, small = live[second]
        free(held)
        one, other = allocate(large), allocate(small)
        live[first], live[second] = (one, large), (other, small)
        if one is None or other is None:
            raise NoRoom
    return perf_counter_ns() - started - _empty_loop(times)


def _empty_loop(times: int) -> int:
    started = perf_counter_ns()
    for _ in repeat(None, times):
        pass
    return perf_counter_ns() - started


def _summary(samples: list[float]) -> dict:
    """Median and p99; None for what was not measured, or is too little to tell from the noise."""
    middle = median(samples) if samples else 0
    if middle <= 0:
        return {"median_us": None, "p99_us": None}
    p99 = (
        sorted(samples)[math.ceil(0.99 * len(samples)) - 1]
        if len(samples) >= FEWEST_FOR_P99
        else None
    )
    return {"median_us": middle, "p99_us": p99}


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector off: it would run inside a batch. The peer's linked blocks need it
    afterwards.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
        gc.collect()


def _blamed_on(name: str):
    return nullcontext() if name in STRATEGIES or name in PEERS else blamed_on(name)


# --- input and output -----------------------------------------------------------------------------


def _strategies(
    names: str | None, peer: ModuleType | None, resolve
) -> dict[str, Callable[[int], Pool]]:
    """Name -> what makes its pool of so many blocks."""
    makers = {}
    for name in (
        map(str.strip, names.split(","))
        if names is not None
        else (*STRATEGIES, *(PEERS if peer else ()))
    ):
        if ":" in name and resolve:
            strategy = resolve(name)
            name, make = strategy_of(strategy).name, partial(pool_of, strategy)
        elif name in PEERS:
            if peer is None:
                raise BadInput(
                    f"strategy {name!r} needs the package vllm-mlx, which is not installed here"
                )
            make = partial(peer_pool, peer, name)
        else:
            one_of("strategy", name, (*STRATEGIES, *PEERS))
            make = partial(pool_of, name)
        if name in makers:
            raise BadInput(
                f"strategy {name!r} is named twice: each may stand once, and a factory needs a "
                "name of its own"
            )
        makers[name] = make
    return makers


def _numbers(option: str, text: str, number: type) -> list:
    """``text`` as the numbers it lists, each once."""
    found = []
    for part in text.split(","):
        try:
            found.append(number(part))
        except ValueError:
            kind = "whole numbers" if number is int else "numbers"
            raise BadInput(
                f"{option} must be {kind} with commas between, not {shown(text)}"
            ) from None
    return list(dict.fromkeys(found))


def environment(peer: ModuleType | None) -> dict:
    """Where and with what this was measured."""
    return doctor.machine() | {"vllm_mlx_version": _peer_version() if peer else None}


def _peer_version() -> str | None:
    try:
        return metadata.version("vllm-mlx")
    except metadata.PackageNotFoundError:
        return None


def ratios(rows: Sequence[dict]) -> list[dict]:
    """Each row's median over its own in the smallest pool, and over the peer's in the same pool."""
    at = {
        tuple(row[key] for key in ("strategy", "num_blocks", "occupancy", "operation")): row[
            "median_us"
        ]
        for row in rows
    }
    smallest = min(row["num_blocks"] for row in rows)
    return [
        {"strategy": name, "num_blocks": num_blocks, "occupancy": occupancy, "operation": operation}
        | {"to_smallest_pool": _over(value, at[name, smallest, occupancy, operation])}
        | {
            f"to_{peer}": _over(value, at.get((peer, num_blocks, occupancy, operation)))
            for peer in PEERS
        }
        for (name, num_blocks, occupancy, operation), value in at.items()
    ]


def report(document: dict) -> str:
    """A block an operation: strategies down, occupancies across, each in the smallest and the
    largest pool and as their ratio.
    """
    rows, pools, where = document["rows"], document["pools"], document["environment"]
    at = {
        (row["strategy"], row["num_blocks"], row["occupancy"], row["operation"]): row["median_us"]
        for row in rows
    }
    at |= {
        (pool["strategy"], pool["num_blocks"], pool["occupancy"], TURNOVER): pool[
            f"{TURNOVER}_median_us"
        ]
        for pool in pools
    }
    names, sizes, occupancies = (
        list(dict.fromkeys(row[key] for row in rows))
        for key in ("strategy", "num_blocks", "occupancy")
    )
    small, large = min(sizes), max(sizes)
    lines = [
        textwrap.shorten(
            f"Medians in microseconds; {where['cores']} cores of {where['processor']}, Python "
            f"{where['python_version']}",
            WIDTH,
        ),
        f"Requests of {rows[0]['request_blocks']} blocks; turnover, a request: two of many sizes "
        "leave, two come.",
    ]
    for operation, first in product((*OPERATIONS, TURNOVER), range(0, len(occupancies), 3)):
        columns = occupancies[first : first + 3]
        lines += [
            "",
            f"{operation:<18}"
            + "".join(f"{f'{100 * share:.4g} % in use':>20}" for share in columns),
        ]
        lines.append(
            " " * 18
            + (f"{small:>7}{large:>8}{'x':>5}" if small != large else f"{small:>20}") * len(columns)
        )
        for name in names:
            cells = [f"{name if len(name) <= 18 else name[:17] + '…':<18}"]
            for share in columns:
                low, high = at[name, small, share, operation], at[name, large, share, operation]
                both = f"{_short(low):>7}{_short(high):>8}{_short(_over(high, low)):>5}"
                cells.append(both if small != large else f"{_short(low):>20}")
            lines.append("".join(cells))
    return "\n".join(
        [*lines, "", *(textwrap.fill(line, WIDTH) for line in _findings(document, small, large))]
    )


def _findings(document: dict, small: int, large: int) -> Iterator[str]:
    """How ours relate to the peer and to the small pool, and how much the figures scatter."""
    ours = [
        r
        for r in document["ratios"]
        if r["num_blocks"] == large and r["operation"] == PAIR and r["strategy"] not in PEERS
    ]

    def spread(key: str) -> str | None:
        found = sorted((ratio[key], ratio["strategy"]) for ratio in ours if ratio[key] is not None)
        return (
            f"{_short(found[0][0])} ({found[0][1]}) to {_short(found[-1][0])} ({found[-1][1]})"
            if found
            else None
        )

    parts = [f"{span} of the time of {peer}" for peer in PEERS if (span := spread(f"to_{peer}"))]
    if small != large and (span := spread("to_smallest_pool")):
        parts.append(f"{span} times what they take at {small}")
    if parts:
        yield f"At {large} blocks allocate + free of ours take {'; '.join(parts)}."
    if not document["environment"]["vllm_mlx_version"]:
        yield "vllm-mlx is not installed, so it is not compared."
    scatter = sorted(
        row["p99_us"] / row["median_us"]
        for row in document["rows"]
        if row["operation"] == PAIR and row["p99_us"]
    )
    if scatter:
        middle, worst = _short(median(scatter)), _short(scatter[-1])
        yield (
            f"The 99th percentile of batches of allocate + free is {middle} times the median, at "
            f"worst {worst} times."
        )
    yield "-: never extends, occupancy out of reach, or too little to measure."


def _over(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value / base


def _short(value: float | None) -> str:
    return (
        "-"
        if value is None
        else f"{value:.2f}"
        if value < 9.995
        else f"{value:.1f}"
        if value < 99.95
        else f"{value:.0f}"
    )
