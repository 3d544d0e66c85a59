"""Pools in use: an allocator of ours or of a peer's as plain functions, and the requests that live
in it. For `allocbench`.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import ModuleType

from ..allocators import Allocator, make_allocator

PEERS = ("vllm-mlx", "vllm-mlx-block")  # batched functions, one function a block
SIGMA = 0.6  # of the lognormal sizes
PLACES_TRIED, IN_A_ROW = (
    4096,
    8,
)  # for one that can be extended; so often, since joining what was freed may be put off


@dataclass(slots=True)
class Pool:
    """An allocator, ours or the peer's, as plain functions, so that nothing is added to what is
    timed; and who lives in it.
    """

    num_blocks: int
    allocate: Callable  # timed; called only where there is room
    ask: Callable  # the same, and None when there is none
    extend: Callable
    free: Callable
    stats: Callable
    free_blocks: Callable[[], int]
    check: Callable[[], None]
    size: Callable[[object], int]  # blocks of what was handed out
    rng: Random = field(default_factory=Random)
    live: list[tuple[object, int]] = field(
        default_factory=list
    )  # what was handed out, blocks asked for
    waiting: list[int] = field(
        default_factory=list
    )  # blocks asked for by requests that found no room
    used: int = 0

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
        """Half of the requests leave and others of their sizes come."""
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
        """Whether requests find places with a free block behind, again and again; those without are
        held as long as this lasts.
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


def find_peer() -> ModuleType | None:
    """`vllm_mlx.paged_cache`, and no more of its package than this one file: the rest needs a model
    server's dependencies.
    """
    spec = importlib.util.find_spec("vllm_mlx")
    folders = (spec and spec.submodule_search_locations) or ()
    file = next(
        (file for folder in folders if (file := Path(folder, "paged_cache.py")).is_file()), None
    )
    if file is None:
        return None
    spec = importlib.util.spec_from_file_location("vllm_mlx_paged_cache", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # its data classes look their module up
    try:
        spec.loader.exec_module(module)
    except Exception:  # whatever another version lacks: a peer that cannot be imported is not there
        return None
    return module


def peer_pool(peer: ModuleType, name: str, num_blocks: int) -> Pool:
    """The peer with as many blocks to hand out: it keeps one for itself."""
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
        check=lambda: None,  # it has none
        size=len,
    )
