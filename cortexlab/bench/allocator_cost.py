"""What bookkeeping costs: microseconds for allocate + free, extend and stats under each strategy,
beside vllm-mlx's block pool.

Why: a strategy that saves memory is of no use if deciding takes as long as computing. Its cost must
be small, and must not grow with the pool. How:

- *Aged pools.* A pool is filled until a request does not fit, with lognormal sizes (median
  ``request_blocks``), and emptied at random; it is then filled again, emptied to the occupancy and
  churned: half of its requests leave and others of equal sizes come, two by two, and those that
  find no room wait. All of it scales with the pool, so pools of all sizes are equally old. Where
  the measured request finds no room, others leave until it does. ``pools`` says how full each
  really was (the median of the rounds); one that does not come near the occupancy gives nulls.
- *Batches of about a millisecond*, so that the clock costs nothing. A row has the median and the
  99th percentile over batches of the time an operation took; the latter is null below 100 batches,
  as slow operations have. The time of the loop and of the clock is subtracted.
- *Rounds.* Sizes, occupancies and strategies take turns, so noise hits all alike, and every round
  fills, empties and churns anew, so no figure hangs on one state of the free list. Python's garbage
  collector is off.
- ``allocate+free``: one request comes and goes, again and again, alone. That is the warm case: most
  strategies hand out again what was freed last, and one may keep it at hand, while the peer's queue
  walks on through its pool.
- ``extend``: the clock runs over one extension by a block, between allocate and free. Places
  without room behind them are held out of the way. Null where all are such places, and for
  strategies that never extend.
- ``stats``: allocate, stats, free, stats, less the pair timed beside it, halved: work put off until
  stats are asked for is counted too.
- ``turnover`` (in ``pools``): two requests leave at random, two of equal sizes come, the larger
  first, which fits wherever free blocks are found and joined; the time a request. That is the cold
  case, and nearer to serving. It scrambles small pools more than large ones, so ``paged``, whose
  cost is the number of extents, is dearest in small ones.

The peer is `PagedCacheManager` of vllm-mlx where that is installed. ``vllm-mlx`` calls the batched
functions that it documents, the fastest there are (`get_new_blocks`, `free_block_batch`),
``vllm-mlx-block`` one function a block, as its own engine does (`allocate_block`, `free_block`).
Nothing is in its prefix cache, so it evicts nothing.
"""

import gc
import importlib.util
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import product, repeat
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter_ns
from types import ModuleType

from ..allocators import STRATEGIES, Allocator, make_allocator
from ..errors import BadInput, blamed_on

OPERATIONS = PAIR, EXTEND, STATS = "allocate+free", "extend", "stats"
TURNOVER = "turnover"
PEERS = ("vllm-mlx", "vllm-mlx-block")  # batched functions, one function a block
SIGMA = 0.6  # of the lognormal sizes
# For a place that can be extended: places tried; successes in a row that are needed, since an
# allocator may put off joining what was freed.
PLACES_TRIED, IN_A_ROW = 4096, 8
AGEING = 1  # times that a pool is filled and emptied before the first round
ROUNDS, BATCHES = 5, 21  # of each operation, pool and occupancy: 105 batches
BATCH_NS = 1_000_000  # target of one batch
ROUND_NS = 150_000_000  # limit of all batches of an operation in one round
FEWEST_FOR_P99 = 100  # batches
NEAR = 0.8  # of the occupancy asked for: what a pool must reach


# --- a pool in use --------------------------------------------------------------------------------


@dataclass(slots=True)
class Pool:
    """An allocator, ours or the peer's, as plain functions, so that nothing is added to what is
    timed, and the requests that live in it.
    """

    num_blocks: int
    allocate: Callable  # timed; called only where there is room
    ask: Callable  # `allocate`, but None where there is no room
    extend: Callable
    free: Callable
    stats: Callable
    free_blocks: Callable[[], int]
    check: Callable[[], None]
    size: Callable[[object], int]  # number of blocks in an allocation
    rng: Random = field(default_factory=Random)
    live: list[tuple[object, int]] = field(default_factory=list)  # allocation, blocks asked for
    waiting: list[int] = field(default_factory=list)  # blocks asked for, of requests without room
    used: int = 0  # blocks
    num_usable: int = field(init=False)  # blocks free in a new pool

    def __post_init__(self) -> None:
        self.num_usable = self.free_blocks()

    def fill(self, request_blocks: int) -> None:
        """Requests of random sizes until one does not fit; none is larger than an eighth of the
        pool, the region of static.
        """
        largest = max(1, self.num_blocks // 8)
        asked = 0
        while self.used < self.num_blocks and (asked == 0 or self._come(asked)):
            asked = min(
                largest, math.ceil(self.rng.lognormvariate(math.log(request_blocks), SIGMA))
            )

    def thin(self, occupancy: float) -> None:
        """Requests leave at random until at most ``occupancy`` is in use."""
        self.waiting.clear()
        while self.used > occupancy * self.num_blocks:
            self._leave()

    def churn(self) -> None:
        """Half of the requests leave, others of equal sizes come."""
        for _ in range(len(self.live) // 4):
            self.waiting += [self._leave() for _ in range(min(2, len(self.live)))]
            self.rng.shuffle(self.waiting)
            self.waiting = [asked for asked in self.waiting if not self._come(asked)]

    def make_room(self, request_blocks: int) -> bool:
        """Free until a request fits; False when it does not fit an empty pool."""
        while (held := self.ask(request_blocks)) is None:
            if not self.live:
                return False
            self._leave()
        self.free(held)
        return True

    @contextmanager
    def extensible(self, request_blocks: int) -> Iterator[bool]:
        """Whether requests find places with a free block behind, again and again. Places without
        one are held until the context ends.
        """
        held, in_a_row = [], 0
        while (
            in_a_row < IN_A_ROW
            and len(held) < PLACES_TRIED
            and (place := self.ask(request_blocks)) is not None
        ):
            if (grown := self.extend(place, 1)) is None:
                held.append(place)
                in_a_row = 0
            else:
                self.free(grown)
                in_a_row += 1
        yield in_a_row == IN_A_ROW
        for place in reversed(held):
            self.free(place)

    def _come(self, asked: int) -> bool:
        held = self.ask(asked)
        if held is None:
            return False
        if (size := self.size(held)) < asked:
            raise ValueError(f"{size} blocks handed out where {asked} were asked for")
        self.live.append((held, asked))
        self.used += size
        return True

    def _leave(self) -> int:
        at = self.rng.randrange(len(self.live))
        self.live[at], self.live[-1] = self.live[-1], self.live[at]
        held, asked = self.live.pop()
        self.used -= self.size(held)
        self.free(held)
        return asked


def pool_of(strategy: str | Callable[[int], Allocator], num_blocks: int) -> Pool:
    a = make_allocator(strategy, num_blocks)
    return Pool(
        num_blocks=num_blocks,
        allocate=a.allocate,
        ask=a.allocate,
        extend=a.extend,
        free=a.free,
        stats=a.stats,
        free_blocks=lambda: a.stats()["free_blocks"],
        check=a.check,
        size=lambda extents: sum(extent.num_blocks for extent in extents),
    )


# --- the peer -----------------------------------------------------------------------------------


def find_peer() -> ModuleType | None:
    """`vllm_mlx.paged_cache`, this one file alone: the rest of its package needs a model server's
    dependencies. None where it is not installed.
    """
    spec = importlib.util.find_spec("vllm_mlx")
    folders = (spec and spec.submodule_search_locations) or ()
    file = next(
        (file for folder in folders if (file := Path(folder, "paged_cache.py")).is_file()), None
    )
    if file is None:
        return None
    spec = importlib.util.spec_from_file_location("vllm_mlx_paged_cache", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its data classes look their module up
    try:
        spec.loader.exec_module(module)
    except Exception:  # another version may lack anything: what cannot be imported is not there
        return None
    return module


def peer_pool(peer: ModuleType, name: str, num_blocks: int) -> Pool:
    """The peer with ``num_blocks`` to hand out, and one that it keeps for itself."""
    manager = peer.PagedCacheManager(max_blocks=num_blocks + 1)
    allocate_block, free_block = manager.allocate_block, manager.free_block
    one_by_one = name != PEERS[0]

    def allocate_each(n: int) -> list:
        return [allocate_block() for _ in range(n)]

    def free_each(blocks: Iterable) -> None:
        for block in blocks:
            free_block(block.block_id)

    allocate = allocate_each if one_by_one else manager.get_new_blocks

    def extend(blocks: list, n: int) -> list | None:
        if manager.free_blocks < n:
            return None
        blocks += allocate(n)
        return blocks

    return Pool(
        num_blocks=num_blocks,
        allocate=allocate,
        ask=lambda n: allocate(n) if manager.free_blocks >= n else None,
        extend=extend,
        free=free_each if one_by_one else manager.free_block_batch,
        stats=manager.get_stats,
        free_blocks=lambda: manager.free_blocks,
        check=lambda: None,  # the peer has no check
        size=len,
    )


# --- measuring ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _State:
    """What all rounds found in one pool at one occupancy."""

    shares: list[float] = field(default_factory=list)  # of the pool in use
    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # us

    def add(self, share: float, figures: Mapping[str, list[float]]) -> None:
        self.shares.append(share)
        for operation, microseconds in figures.items():
            self.figures[operation] += microseconds

    def summaries(self, occupancy: float) -> dict[str, dict]:
        """By operation; nothing measured where the pool did not come near ``occupancy``."""
        reached = median(self.shares) >= NEAR * occupancy
        return {
            operation: _summary(self.figures[operation] if reached else [])
            for operation in (*OPERATIONS, TURNOVER)
        }


def measure(
    makers: Mapping[str, Callable[[int], Pool]],
    sizes: Sequence[int],
    occupancies: Sequence[float],
    request_blocks: int,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> tuple[list[dict], list[dict]]:
    """Rows and ``pools``. `BadInput` names a strategy that raises or loses blocks."""
    with _no_collector():
        states = _measured(makers, sizes, occupancies, request_blocks, seed, progress)
    rows, used = [], []
    for num_blocks, name, occupancy in product(sizes, makers, occupancies):
        state = states[num_blocks, name, occupancy]
        where = {"strategy": name, "num_blocks": num_blocks, "occupancy": occupancy}
        found = state.summaries(occupancy)
        rows += [
            where | {"request_blocks": request_blocks, "operation": operation} | found[operation]
            for operation in OPERATIONS
        ]
        turnover = {f"{TURNOVER}_{key}": value for key, value in found[TURNOVER].items()}
        used.append(where | {"used_share": median(state.shares)} | turnover)
    return rows, used


def with_turnover(rows: Sequence[dict], pools: Sequence[dict]) -> list[dict]:
    """What `measure` found, the median of `TURNOVER` as one more operation."""
    turnover = [
        {key: pool[key] for key in ("strategy", "num_blocks", "occupancy")}
        | {"request_blocks": rows[0]["request_blocks"]}
        | {"operation": TURNOVER, "median_us": pool[f"{TURNOVER}_median_us"]}
        for pool in pools
    ]
    return [*rows, *turnover]


def _measured(
    makers: Mapping[str, Callable[[int], Pool]],
    sizes: Sequence[int],
    occupancies: Sequence[float],
    request_blocks: int,
    seed: int,
    progress: Callable[[], object],
) -> dict[tuple, _State]:
    """By pool size, strategy and occupancy. The pools are out of reach afterwards, so that their
    memory can be collected.
    """
    pools = {
        (num_blocks, name): _aged(name, makers[name], num_blocks, request_blocks, seed)
        for num_blocks, name in product(sizes, makers)
    }
    states = defaultdict(_State)
    for index in range(ROUNDS):
        turn = index % len(pools)
        for num_blocks, name in [*pools, *pools][turn : turn + len(pools)]:
            pool = pools[num_blocks, name]
            for occupancy, *found in _round(name, pool, occupancies, request_blocks):
                states[num_blocks, name, occupancy].add(*found)
                progress()
    return states


def _aged(
    name: str, make: Callable[[int], Pool], num_blocks: int, request_blocks: int, seed: int
) -> Pool:
    with _blamed_on(name):
        pool = make(num_blocks)
        pool.rng.seed(seed)
        for _ in range(AGEING):
            pool.fill(request_blocks)
            pool.thin(0)
    return pool


def _round(
    name: str, pool: Pool, occupancies: Sequence[float], request_blocks: int
) -> Iterator[tuple[float, float, dict[str, list[float]]]]:
    """Each occupancy, from the fullest down: the share in use and the figures, none where the
    request does not fit.
    """
    with _blamed_on(name):
        pool.fill(request_blocks)
        for occupancy in sorted(occupancies, reverse=True):
            pool.thin(occupancy)
            pool.churn()
            fits = pool.make_room(request_blocks)
            share = pool.used / pool.num_blocks
            yield occupancy, share, _figures(pool, request_blocks) if fits else {}
        pool.thin(0)
        free = pool.free_blocks()
        pool.check()
    if free != pool.num_usable:
        raise BadInput(
            f"strategy {name!r} loses blocks: {pool.num_usable} were free, {free} are when all are "
            "given back"
        )


class NoRoom(Exception):
    """No room to extend, or none for two requests where two of equal sizes had just left."""


def _figures(pool: Pool, request_blocks: int) -> dict[str, list[float]]:
    """Microseconds an operation, one figure a batch. The request must fit."""
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
    """`BATCHES` turns, or as many as begin within `ROUND_NS`."""
    until = perf_counter_ns() + ROUND_NS
    for _ in range(BATCHES):
        yield
        if perf_counter_ns() > until:
            return


def _batch(
    work: Callable[[Pool, int, int], int], pool: Pool, request_blocks: int
) -> Callable[[], float]:
    """A function that runs ``work`` as many times as take `BATCH_NS`, and returns microseconds a
    time. Finding how many warms up.
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
    """Median and p99; None where nothing was measured, or too little to tell from noise."""
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
    """Python's garbage collector off, which would run inside a batch. It runs afterwards, for the
    peer's linked blocks.
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
