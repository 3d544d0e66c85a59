"""Block allocators: one placement a file, one table of strategies."""

from .base import Allocator, Extent, Moved, Stats, block_map, merged
from .buddy import Buddy
from .contiguous import BestFit, FirstFit, Segregated
from .cortexstream_buddy import CortexStreamBuddy
from .counted import counted
from .paged import Paged
from .runs import Runs
from .static import Static
from .strategies import (
    DEFAULT_REGIONS,
    GROWTHS,
    PLACEMENTS,
    STRATEGIES,
    Strategy,
    blamed_on,
    check_names,
    make_allocator,
    strategy_of,
)
