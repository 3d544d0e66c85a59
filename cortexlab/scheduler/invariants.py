"""What holds of a block manager's books at any time."""

from itertools import chain, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .block_manager import BlockManager


def check_books(blocks: "BlockManager") -> None:
    """`BlockManager.check`."""
    blocks.allocator.check()
    shared = {block: None for table in blocks.tables for block in table.shared}
    held = sorted(chain(*(each.extents for each in chain(blocks.tables, shared))))
    assert not held or (held[0].start >= 0 and held[-1].end <= blocks.num_blocks), (
        "a block lies outside the pool"
    )
    assert all(a.end <= b.start for a, b in pairwise(held)), "two sequences hold one block"
    for table in blocks.tables:
        assert sum(size for _, size in table.extents) == table.num_own
    idle = 0
    if blocks.prefix is not None:
        blocks.prefix.check()
        idle = blocks.prefix.num_idle
    held_blocks = sum(extent.num_blocks for extent in held)
    assert held_blocks + idle == blocks.stats().used_blocks, "a block is lost"
    assert held_blocks == blocks.num_held
