"""Many random steps of every strategy against the bitmap: `python tests/soak_allocators.py --steps
1000000 --seed 1 [--strategy NAME]`.

Every step compares the blocks, what can still be had, and the statistics; every hundredth calls
`check()`. Every 5,000 steps begin a new pool, of 1 to 300 blocks in leaves of 2 to 512, so that
sums over several leaves are met too. Prints one line a strategy; a failure names the seed and the
step. Exit code 1 if one failed, or if a strategy has no entry in `allocator_cases.CASES`.
"""

import argparse
import random
import sys
import time

from allocator_cases import CASES, Pair, random_step

from cortexlab.allocators import STRATEGIES
from cortexlab.allocators.free_map import FreeMap
from cortexlab.allocators.holes import HoleAddresses

STEPS_A_POOL = 5_000
STEPS_A_CHECK = 100


def soak(strategy: str, steps: int, seed: int) -> None:
    """``steps`` random steps of ``strategy``; an `AssertionError` says where the allocator and the
    bitmap first disagree.
    """
    before = FreeMap.LEAF_BLOCKS, FreeMap.MANY_LEAVES, HoleAddresses.STRETCH_BLOCKS
    rng = random.Random(f"{strategy} {seed}")
    step = 0
    try:
        while step < steps:
            FreeMap.LEAF_BLOCKS = HoleAddresses.STRETCH_BLOCKS = 1 << rng.randint(1, 9)
            FreeMap.MANY_LEAVES = rng.randint(1, 8)
            num_blocks = rng.choice((rng.randint(1, 20), rng.randint(1, 300)))
            largest = rng.randint(1, max(1, num_blocks // 2))
            pair = Pair(CASES[strategy], num_blocks)
            for _ in range(min(STEPS_A_POOL, steps - step)):
                step += 1
                random_step(pair, rng, largest)
                pair.agree()
                if step % STEPS_A_CHECK == 0:
                    pair.pool.check()
            pair.pool.check()
    except Exception as error:
        raise AssertionError(
            f"{strategy}, seed {seed}, step {step}, a pool of {num_blocks}: {error!r}"
        ) from error
    finally:
        FreeMap.LEAF_BLOCKS, FreeMap.MANY_LEAVES, HoleAddresses.STRETCH_BLOCKS = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--strategy", choices=sorted({*STRATEGIES, *CASES}), help="default: all")
    given = parser.parse_args()
    failed = False
    for strategy in (
        [given.strategy] if given.strategy else [*STRATEGIES, *(CASES.keys() - STRATEGIES.keys())]
    ):
        started = time.perf_counter()
        try:
            soak(strategy, given.steps, given.seed)
            found = "as the bitmap says"
        except AssertionError as error:
            failed, found = True, f"FAILED: {error}"
        print(
            f"{strategy:20} {given.steps:>9,} steps, seed {given.seed}, "
            f"{time.perf_counter() - started:6.1f} s: {found}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
