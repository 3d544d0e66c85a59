"""Groups of layers that keep the same tokens, and a block table for each. Integers only.

Five layers with a window of 32 tokens to one that sees all; 1,000 tokens, blocks of 16:

    group of      tokens kept                                          blocks
    layer 5       0 ................................................ 999   63
    layer 0                                            960 ......... 999    3
    ...                                                960 ......... 999    3
    layer 4                                            960 ......... 999    3

All groups have the same number of layers, so a block of one is as large as a block of another, and
one pool, one allocator and one arena serve all: array i of the arena holds layer i of every group.
A group with fewer layers is *padded*. (vLLM's hybrid KV cache manager does this; so does Jenga,
Zhang et al., SOSP 2025.)

Blocks that a window has passed are free while the sequence runs. By how a strategy grows:

chain      a window's table gives its front back (`OptionalParts.release_front`) and gains blocks at
           its end. Without that verb it is as under relocate.
relocate   a window's table is a *ring* for a chunk of the prompt and the window before it: passed
           blocks serve again. After the prompt it moves to a ring for single tokens.
reserve    all groups lie in one allocation, windows as rings that keep their size.

With prefix caching (only where fronts are given back), a prompt's whole blocks are cached under
``(group, id)``. What a window passes stays in the cache, held by nobody. A prompt begins behind the
longest prefix of which groups without a window have all blocks, and the others those that the next
token sees.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, takewhile
from typing import NamedTuple

from ..allocators import Extent, merged
from .block_manager import BlockManager
from .block_table import BlockTable, CachedBlock, Move, Need, Way, slot_runs


class LayerGroup(NamedTuple):
    """Layers of a model, by number, that attend to the last ``window`` tokens, or to all (None).
    A block has room for ``size`` layers.
    """

    layers: tuple[int, ...]
    size: int
    window: int | None = None


def layer_groups(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Groups for layers with these ``windows``; those that see all tokens come first.

    Their size is the number of layers of the rarest window or of the commonest, whichever leaves
    fewer layers empty: Gemma-3-4B, 29 layers of a window and 5 without, has 7 groups of 5 with one
    empty layer.
    """
    of_window: dict[int | None, list[int]] = {}
    if not windows:
        return (LayerGroup((), 0),)
    for layer, window in enumerate(windows):
        of_window.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in of_window.values()]
    size = min(max(counts), min(counts), key=lambda size: sum(-(-n // size) * size for n in counts))
    return tuple(
        LayerGroup(tuple(layers[first : first + size]), size, window)
        for window, layers in sorted(of_window.items(), key=lambda item: item[0] or 0)
        for first in range(0, len(layers), size)
    )


@dataclass(eq=False, slots=True)
class Ring(BlockTable):
    """A table whose blocks stand in a circle: the first ``turned`` of them come last in token
    order.
    """

    turned: int = 0

    @property
    def all_extents(self) -> tuple[Extent, ...]:
        rest = cut_out(self.extents, self.turned, self.num_blocks)
        return merged(chain(rest, cut_out(self.extents, 0, self.turned)))


@dataclass(eq=False, slots=True)
class GroupedTable:
    """A sequence's block tables, ``parts``, one a group. Each counts from its first token that is
    still kept: ``skipped`` tokens before that are gone.
    """

    parts: tuple[BlockTable, ...]
    num_admitted: int  # tokens there were at admission: those after them come one by one
    whole: BlockTable | None = None  # with the allocation of all parts
    prefix_ids: Sequence[Hashable] = ()  # of the prompt's whole blocks
    num_found: int = 0  # of these, in the cache
    settled: int = 0  # tokens up to which `grow` has nothing to do

    @property
    def is_old(self) -> bool:
        return any(part.is_old for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence in the cache, those that windows have passed included."""
        return self.parts[0].num_tokens + self.parts[0].skipped

    @num_tokens.setter
    def num_tokens(self, num_tokens: int) -> None:
        for part in self.parts:
            part.num_tokens = num_tokens - part.skipped


class Admission(NamedTuple):
    """What a sequence finds in the cache, and what it takes."""

    num_found: int  # whole blocks of its prompt that all groups have, as far as they need them
    computed: int  # tokens that these hold, but for one to sample from
    passed: list[int]  # blocks that no token of its first step sees, of each group
    found: list[list[CachedBlock]]  # of each group, those that its table will hold
    sizes: list[int]  # blocks of each table


class GroupedBlocks(BlockManager):
    """A `BlockManager` with a table for each of ``groups``. ``max_chunk``: the most tokens of a
    sequence that one step computes.
    """

    def __init__(self, groups: Sequence[LayerGroup], max_chunk: int, *args, **options):
        self.groups, self.max_chunk = tuple(groups), max_chunk
        shares = (len(layers) / size for layers, size, _ in groups)
        self.layer_shares = tuple(1 if share == 1 else share for share in shares)
        self.prefix = None  # until `clear`
        super().__init__(*args, **options)

    def clear(self) -> None:
        super().clear()
        self.sequences: dict[GroupedTable, None] = {}
        if self.growth == "reserve":  # parts lie at fixed places in an allocation
            self._compact = None

    def blocks_wanted(self, need: Need) -> int:
        asked = self._admission(need)
        return sum(asked.sizes) - sum(block.num_holders > 0 for block in chain(*asked.found))

    def allocate(self, need: Need) -> GroupedTable | None:
        """A table with parts for all tokens of groups that see them all, and for the first chunk of
        the others. None, and nothing taken, without room for all.
        """
        asked, ids = self._admission(need), need.prefix_ids[: need.prompt_tokens // self.block_size]
        releases, held = self.num_releases, sum(b.num_holders > 0 for b in chain(*asked.found))
        if sum(asked.sizes) - held > self.free_blocks:
            return None
        parts = tuple(map(partial(self._part, need, asked), range(len(self.groups))))
        table = GroupedTable(parts, need.num_tokens, None, ids, asked.num_found)
        if self.growth == "reserve":
            table.whole = whole = super().allocate(need)
            if whole is None:
                return None
            for part, size, stop in zip(parts, asked.sizes, accumulate(asked.sizes), strict=True):
                part.replace(tuple(cut_out(whole.extents, stop - size, stop)))
        else:
            self.tables |= dict.fromkeys(parts)
            # The largest first: halves of a buddy fill up in this order, if they do in any.
            for number in sorted(range(len(parts)), key=asked.sizes.__getitem__, reverse=True):
                missing = asked.sizes[number] - parts[number].num_blocks
                if not self._add_blocks(number, parts[number], missing, ids):
                    for each in parts:
                        super().free(each)
                    self.num_releases = releases  # what was free before is free again
                    return None
        self.sequences[table] = None
        return table

    def grow(self, table: GroupedTable, num_tokens: int) -> bool:
        """Make each part hold its tokens of the first ``num_tokens``, and give back what windows
        have passed. False when one cannot; parts that could keep their new blocks.
        """
        if num_tokens <= table.settled:
            return True
        start, is_decoding = table.num_tokens, num_tokens > table.num_admitted
        for number, (part, group) in enumerate(zip(table.parts, self.groups, strict=True)):
            if passed := self._passed(group, start) - part.skipped // self.block_size:
                self._pass(part, passed)
            if isinstance(part, Ring) and is_decoding and table.whole is None:
                self._shrink(part, self._ring(group, 1))
            missing = self.blocks_for(num_tokens - part.skipped) - part.num_blocks
            if not self._add_blocks(number, part, missing, table.prefix_ids):
                return False
        settled = min(part.skipped + part.capacity for part in table.parts)
        table.settled = settled if is_decoding else min(settled, table.num_admitted)
        return True

    def free(self, table: GroupedTable, prefix_ids: Sequence[Hashable] = ()) -> None:
        del self.sequences[table]
        if table.whole is not None:
            return super().free(table.whole)
        for number, part in enumerate(table.parts):
            known = prefix_ids[part.skipped // self.block_size :]
            super().free(part, [(number, each) for each in known])

    def check(self) -> None:
        super().check()
        allocated = [each.parts if each.whole is None else (each.whole,) for each in self.sequences]
        assert {*self.tables} == {*chain(*allocated)}
        for table in self.sequences:
            assert {part.num_tokens + part.skipped for part in table.parts} == {table.num_tokens}
            assert all(part.num_tokens <= part.capacity for part in table.parts)

    def _blocks_of(self, need: Need) -> int:
        return sum(self._admission(need).sizes)

    def _ring(self, group: LayerGroup, chunk: int) -> int:
        """Blocks that hold a chunk and the window before it, wherever in a block it begins."""
        return self.blocks_for(group.window - 1 + chunk) + 1

    def _passed(self, group: LayerGroup, start: int) -> int:
        """Blocks that no token from position ``start`` on sees."""
        return 0 if group.window is None else max(0, start - group.window + 1) // self.block_size

    def _admission(self, need: Need) -> Admission:
        num_found, is_reserved = self._num_found(need), self.growth == "reserve"
        computed = min(num_found * self.block_size, need.num_tokens - 1)  # one is to sample from
        start = max(need.num_back, computed)
        passed = [self._passed(group, start) for group in self.groups]
        sizes = self._most(need.max_slots if is_reserved else need.num_tokens, start)
        if self.strategy.gives_front:
            first = self.blocks_for(min(need.num_tokens, start + min(need.chunk, self.max_chunk)))
            for number, group in enumerate(self.groups):
                if group.window is not None:
                    sizes[number] = min(sizes[number], first - passed[number])
        found = [[] for _ in passed]
        for number, gone in enumerate(passed) if num_found else ():
            ids = need.prefix_ids[gone:num_found]
            found[number] = self.prefix.match([(number, each) for each in ids])
        return Admission(num_found, computed, passed, found, sizes)

    def _allocations(self, num_tokens: int) -> list[int]:
        sizes = self._most(num_tokens)
        return [sum(sizes)] if self.growth == "reserve" else sorted(sizes, reverse=True)

    def _most(self, num_tokens: int, start: int = 0) -> list[int]:
        """Blocks of each group that ``num_tokens`` need at most, from token ``start`` on."""
        every = self.blocks_for(num_tokens)
        return [
            every
            if group.window is None
            else min(every - self._passed(group, start), self._ring(group, self.max_chunk))
            for group in self.groups
        ]

    def _num_found(self, need: Need) -> int:
        ids = need.prefix_ids[: need.prompt_tokens // self.block_size]
        if self.prefix is None or not ids:
            return 0

        def has(found: int) -> bool:
            start = min(found * self.block_size, need.num_tokens - 1)
            return all(
                (number, each) in self.prefix
                for number, group in enumerate(self.groups)
                if group.window is not None
                for each in ids[self._passed(group, start) : found]
            )

        full = [number for number, group in enumerate(self.groups) if group.window is None]
        known = takewhile(lambda each: all((n, each) in self.prefix for n in full), ids)
        return next(found for found in range(sum(1 for _ in known), -1, -1) if has(found))

    def _part(self, need: Need, asked: Admission, number: int) -> BlockTable:
        """A table with nothing but the blocks found."""
        passed, found = asked.passed[number], asked.found[number]
        skipped = passed * self.block_size
        if found:
            self.prefix.hold(found)
        is_ring = self.groups[number].window is not None and not self.strategy.gives_front
        return (Ring if is_ring else BlockTable)(
            (), self.block_size, max(0, asked.computed - skipped), tuple(found),
            max(0, asked.num_found - passed), need.prompt_tokens - skipped, skipped=skipped,
        )  # fmt: skip

    def _add_blocks(
        self, number: int, part: BlockTable, num_blocks: int, ids: Sequence[Hashable]
    ) -> bool:
        """Add blocks to a part. While the prompt lasts, they are cached under its ``ids``."""
        new = []
        if self.prefix is not None and num_blocks > 0 and not (part.extents or part.is_old):
            at = part.skipped // self.block_size + part.num_blocks
            of_group = ((number, each) for each in ids[at : at + num_blocks])
            new = list(takewhile(lambda each: each not in self.prefix, of_group))
        if not new:
            return super().grow(part, (part.num_blocks + num_blocks) * self.block_size)
        taken = self.prefix.take_apart(num_blocks, len(new))
        if taken is None:
            return False
        fresh = [self.prefix.add(each, one) for each, one in zip(new, taken[0], strict=True)]
        self.prefix.hold(fresh)
        part.shared += tuple(fresh)
        part.num_blocks += len(fresh)
        part.replace(taken[1])
        return True

    def _pass(self, part: BlockTable, passed: int) -> None:
        """Let go of the first ``passed`` blocks of a window's table: cached ones stay in the cache,
        a ring uses its own again, others are given back.
        """
        gone = min(passed, len(part.shared))
        own = passed - gone
        if gone:
            self.prefix.give_up(part.shared[:gone], gone)
            part.shared = part.shared[gone:]
            part.num_blocks -= gone
        if own and isinstance(part, Ring):
            part.turned = (part.turned + own) % part.num_blocks
            gone = passed
        else:
            if own:
                gone -= part.replace(self.allocator.release_front(part.extents, own))
            self.num_releases += 1
        part.skipped += gone * self.block_size
        part.num_tokens -= gone * self.block_size
        part.prompt_tokens -= gone * self.block_size
        part.num_found = max(0, part.num_found - gone)

    def _shrink(self, ring: Ring, num_blocks: int) -> None:
        """Move a ring to one of ``num_blocks``, if that saves some and there is room."""
        if ring.num_blocks <= num_blocks or self._owes_enough():
            return
        extents = self.allocator.allocate(num_blocks)
        if extents is None:
            return
        if sum(size for _, size in extents) >= ring.num_blocks:
            self.allocator.free(extents)
            return
        self.moves.append(Move(ring.all_extents, extents, ring.num_tokens))
        self.allocator.free(ring.extents)
        self.num_releases += 1
        ring.replace(extents)
        ring.turned = 0


def block_manager(groups: Sequence[LayerGroup], max_chunk: int, *args, **options) -> BlockManager:
    """A `BlockManager`, or `GroupedBlocks` where a layer has a window; further arguments are
    theirs.
    """
    if all(group.window is None for group in groups):
        return BlockManager(*args, **options)
    return GroupedBlocks(groups, max_chunk, *args, **options)


def copies(source: BlockTable, target: BlockTable, way: Way) -> Iterator[Move]:
    """Moves of the tokens in ``source`` to ``target``, part by part, without those already there
    and those that ``target`` skips.
    """
    for a, b in zip(source.parts, target.parts, strict=True):
        passed = (b.skipped - a.skipped) // a.block_size
        kept = cut_out(a.all_extents, passed, a.num_blocks)
        num_tokens = a.num_tokens + a.skipped - b.skipped
        if num_tokens > b.num_tokens:
            yield Move(tuple(kept), b.all_extents, num_tokens, b.num_tokens, way)


def cut_out(extents: Sequence[Extent], first: int, stop: int) -> Iterator[Extent]:
    """Blocks ``first .. stop - 1`` of an allocation, counted in its order."""
    return (Extent(a, b - a) for a, b in slot_runs(extents, 1, first, stop))
