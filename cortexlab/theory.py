"""What theory says before anything is measured: drawn dashed beside the measurement, asserted in tests where it is a theorem."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike


def buddy_size(num_blocks: int) -> int:
    """Blocks that a binary buddy hands out for a request: the next power of two, so less than twice the request."""
    return 1 << (num_blocks - 1).bit_length()


def buddy_waste(sizes: Iterable[int]) -> float:
    """Share of what buddies hand out that nobody asked for, for requests of ``sizes`` blocks: exact."""
    sizes = list(sizes)
    return 1 - sum(sizes) / sum(map(buddy_size, sizes))


BUDDY_WASTE_UNIFORM = 0.25
"""`buddy_waste` of sizes spread evenly between two powers of two, in the limit (Knuth, TAOCP 1, 2.5): mean size 3/4 of the power."""


def fifty_percent_rule(num_extents: ArrayLike, exact_share: float = 0.0) -> np.ndarray:
    """Holes expected beside ``num_extents`` extents in equilibrium under first fit with coalescing (Knuth, TAOCP 1, 2.5):
    half as many, times the share of allocations that do not fill their hole exactly."""
    return np.asarray(num_extents) * (1 - exact_share) / 2


def paged_waste_bound(num_sequences: ArrayLike, block_size: int) -> np.ndarray:
    """Most slots that paging can leave empty, a theorem: all but one of each sequence's last block."""
    return np.asarray(num_sequences) * (block_size - 1)


def paged_utilization(mean_tokens: ArrayLike, block_size: ArrayLike) -> np.ndarray:
    """Live tokens / slots held if sequences of ``mean_tokens`` leave half of their last block empty on average: (block_size - 1) / 2."""
    return np.asarray(mean_tokens) / (np.asarray(mean_tokens) + (np.asarray(block_size) - 1) / 2)
