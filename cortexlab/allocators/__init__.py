"""Block allocators: one placement a file, one table of strategies."""

from .base import Allocator, Extent, Moved, Stats, block_map, merged
from .contiguous import FirstFit
from .counted import counted
from .paged import Paged
from .strategies import (
    GROWTHS,
    STRATEGIES,
    Strategy,
    blamed_on,
    check_names,
    make_allocator,
    strategy_of,
)
