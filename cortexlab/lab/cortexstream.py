"""The physical layer as CortexStream documents it: `KVBlockAllocator` hands out `KVHandle`s of
blocks and knows no sequences.

Source: github.com/pythongiant/CortexStream at f8c8b1f, ``docs/KV_CACHE_API_REFERENCE.md``, in snake
case. Two differences: no room is None, not an invalid handle; and a handle freed twice, of another
allocator, or made up is refused. (CortexStream's code frees blocks that other handles hold, and its
``fragmentation()`` takes its lock twice.)

    allocator = KVBlockAllocator(2048)
    handle = allocator.allocate(32)      # None: no room
    allocator.free(handle)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from ..allocators import Allocator, Extent, Stats, block_map, make_allocator
from ..allocators.base import blocks_of
from ..errors import BadInput, shown


@dataclass(frozen=True, slots=True, eq=False)
class KVHandle:
    """Blocks handed out at once. Compared by identity: a handle made up with equal numbers frees
    nothing.
    """

    start_block_index: int
    num_blocks: int  # at least as many as asked for
    extents: tuple[Extent, ...] = ()  # one, but for strategies that scatter
    allocator: KVBlockAllocator | None = field(default=None, repr=False)

    def is_valid(self) -> bool:
        """Whether the numbers could name blocks: true of every handle that
        `KVBlockAllocator.allocate` returns, freed or not.
        """
        return self.start_block_index >= 0 and self.num_blocks > 0


class KVBlockAllocator:
    """A pool of ``total_blocks`` blocks, placed by any strategy (default: first fit, as
    CortexStream). Safe to call from any thread.

    One lock guards every operation, so no thread sees one half done, and each costs what the
    strategy's operation costs.
    """

    def __init__(self, total_blocks: int, strategy: str | Callable[[int], Allocator] = "first_fit"):
        self._blocks = make_allocator(strategy, total_blocks)
        self._live: dict[int, KVHandle] = {}  # id -> the handle itself
        self._lock = Lock()

    def allocate(self, blocks_needed: int) -> KVHandle | None:
        """A handle on at least ``blocks_needed`` blocks, or None when there is no room: never a
        part. `BadInput` below one block.
        """
        with self._lock:
            extents = self._blocks.allocate(blocks_needed)
            if extents is None:
                return None
            handle = KVHandle(extents[0].start, sum(size for _, size in extents), extents, self)
            self._live[id(handle)] = handle
            return handle

    def free(self, handle: KVHandle) -> None:
        """Take the blocks back. `BadInput` with the reason, and nothing changes, for anything but a
        live handle of this allocator.
        """
        with self._lock:
            if id(handle) not in self._live:
                raise BadInput(f"cannot free {shown(handle)}: {self._reason(handle)}")
            self._blocks.free(handle.extents)
            del self._live[id(handle)]

    def total_blocks(self) -> int:
        return self._blocks.num_blocks

    def free_blocks(self) -> int:
        return self.stats()["free_blocks"]

    def used_blocks(self) -> int:
        return self.stats()["used_blocks"]

    def largest_free_run(self) -> int:
        return self.stats()["largest_free_run"]

    def fragmentation(self) -> float:
        """External: 1 - largest free run / free blocks, 0 when none is free."""
        return self.stats()["external_fragmentation"]

    def stats(self) -> Stats:
        """Figures of one moment: ``free_blocks, used_blocks, largest_free_run, num_holes,
        external_fragmentation``.
        """
        with self._lock:
            return Stats(self._blocks.stats())

    def dump_block_map(self, width: int = 64) -> str:
        """Totals, and the pool as text in rows of ``width`` blocks: `.` a free block, a letter a
        handle.
        """
        with self._lock:
            stats = self._blocks.stats()
            rows = block_map(
                {key: handle.extents for key, handle in self._live.items()},
                self.total_blocks(),
                width,
            )
        return (
            f"KVBlockAllocator: {self.total_blocks()} blocks, {stats['used_blocks']} used, "
            f"{stats['free_blocks']} free, "
            f"fragmentation {stats['external_fragmentation']:.2f}\n{rows}"
        )

    def check(self) -> None:
        """`AssertionError` unless the strategy's books agree, and live handles hold exactly the
        used blocks.
        """
        with self._lock:
            self._blocks.check()
            held = [block for each in self._live.values() for block in blocks_of(each.extents)]
            assert len(set(held)) == len(held) == self._blocks.stats()["used_blocks"], (
                "two handles hold a block, or no handle holds a used one"
            )

    def _reason(self, handle: object) -> str:
        if not isinstance(handle, KVHandle):
            return "it is no KVHandle"
        if handle.allocator is self:
            return "it has been freed already"
        if handle.allocator is not None:
            return "another allocator handed it out"
        overlapped = next((live for live in self._live.values() if _overlap(handle, live)), None)
        return "no allocator handed it out" + (
            f", and it overlaps {overlapped}" if overlapped else ""
        )


def _overlap(made_up: KVHandle, live: KVHandle) -> bool:
    extents = made_up.extents or (Extent(made_up.start_block_index, made_up.num_blocks),)
    try:
        return any(a.start < b.end and b.start < a.end for a in extents for b in live.extents)
    except (AttributeError, TypeError):  # a made-up handle may hold anything
        return False
