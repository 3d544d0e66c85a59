"""What theory says before anything is measured: drawn dashed beside the measurement; theorems are
asserted in tests.

L is a sequence's live tokens, B the slots of a block, and all sums are over the decode steps of all
requests.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def buddy_size(num_blocks: int) -> int:
    """Blocks that a binary buddy hands out for a request: the next power of two, so less than twice
    the request.
    """
    return 1 << (int(num_blocks) - 1).bit_length()


def buddy_waste(sizes: Iterable[int]) -> float:
    """Share of the blocks that buddies hand out beyond those asked for, for requests of ``sizes``
    blocks: exact.
    """
    sizes = list(sizes)
    return 1 - sum(sizes) / sum(map(buddy_size, sizes))


def buddy_utilization(lengths: Iterable[tuple[int, int]], block_size: int) -> float:
    """`utilization` of sequences that grow token by token in buddies, given the prompt and output
    tokens of each: exact.

    Sum of L / sum of B * buddy_size(ceil(L / B)): an outgrown buddy doubles, in place or elsewhere.
    A request's first token comes from its prompt and its last is never written, so L runs from
    prompt + 1 to prompt + output - 1.
    """
    live = np.concatenate([np.arange(prompt + 1, prompt + output) for prompt, output in lengths])
    held = np.array(
        [buddy_size(size) if size else 0 for size in range(-(-int(live.max()) // block_size) + 1)]
    )
    return float(live.sum() / (block_size * held[-(-live // block_size)].sum()))


def paged_utilization(mean_tokens: ArrayLike, block_size: ArrayLike) -> np.ndarray:
    """`utilization` of paging if the mean L is ``mean_tokens`` and sequences leave (B - 1) / 2
    slots empty on average.

    They do where all values of L modulo B are equally frequent. A growing sequence passes through
    them in turn, so over any number of decode steps its empty slots add up to (B - 1) / 2 a step,
    give or take B^2 / 8 once: a theorem. So the formula is nearly exact where outputs are much
    longer than a block.
    """
    return np.asarray(mean_tokens) / _held_slots(mean_tokens, block_size)


def _held_slots(mean_tokens: ArrayLike, block_size: ArrayLike) -> np.ndarray:
    """Slots that a sequence of ``mean_tokens`` holds on average, (B - 1) / 2 of them empty."""
    return np.asarray(mean_tokens) + (np.asarray(block_size) - 1) / 2


def fifty_percent_rule(num_allocations: ArrayLike, remainder_share: float = 1.0) -> np.ndarray:
    """Holes to expect beside n live allocations: p n / 2 (Knuth, TAOCP 1, 2.5), p being the share
    of allocations that leave a remainder.

    For contiguous placement at either end of a hole with immediate coalescing, in equilibrium, each
    live allocation being equally likely to be the next one freed. Why: were a of the n between two
    used neighbours, b between one and a hole, c between two holes, then n = a + b + c, and each
    hole has two sides: 2 holes = b + 2c, but for the ends of the pool. Freeing changes the holes by
    (a - c) / n = 1 - 2 holes / n on average, an allocation by -1 where it fills its hole exactly,
    so by -(1 - p); in equilibrium the two cancel. The rule says nothing of the sizes of holes, so
    it is no bound on the memory lost.
    """
    return np.asarray(num_allocations) * remainder_share / 2


def kv_bytes_per_token(
    num_layers: int, num_kv_heads: int, head_dim: int, bits: int = 16, group_size: int = 64
) -> float:
    """K and V of one token, in bytes. Below 16 bits as mlx-lm's `QuantizedKVCache` holds them:
    numbers of ``bits`` bits, and a 16-bit scale and a 16-bit bias for each group of ``group_size``.
    """
    bits_a_number = bits if bits >= 16 else bits + 2 * 16 / group_size
    return 2 * num_layers * num_kv_heads * head_dim * bits_a_number / 8


def sequences_that_fit(
    memory_bytes: float, bytes_per_token: float, mean_tokens: ArrayLike, block_size: int = 1
) -> np.ndarray:
    """How many sequences of ``mean_tokens`` tokens the memory holds, each in whole blocks, with
    half a block lost on average.
    """
    return np.floor(memory_bytes / bytes_per_token / _held_slots(mean_tokens, block_size))


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Share of a dense batch that is padding, when ``batch_size`` sequences are drawn at random and
    padded to their longest.

    1 - mean / E[longest of n], exact for draws with replacement: the i-th smallest of N lengths is
    the longest with probability (i / N)^n - ((i - 1) / N)^n. A ratio of expectations: the share of
    padding in all slots held over many batches.
    """
    ordered = np.sort(np.asarray(lengths, dtype=float))
    at_most = np.linspace(0, 1, len(ordered) + 1) ** batch_size
    return 1 - ordered.mean() / float((ordered * np.diff(at_most)).sum())
