"""Many random steps of every strategy against the bitmap: `python tests/soak_allocators.py --steps
1000000 --seed 1 [--strategy NAME]`.

Every step compares the blocks, the refusals and the statistics; every hundredth step calls
`check()`. Every 5,000 steps begin a new pool of 1 to 300 blocks in stretches of 2 to 512, so that
first fit also searches several stretches. Prints one line a strategy; a failure names the seed and
the step. Exit code 1 if a strategy failed, or has no entry in `allocator_cases.CASES`.
"""

import argparse
import random
import sys
import time

from allocator_cases import CASES, Pair, random_step

from cortexlab.allocators import STRATEGIES
from cortexlab.allocators.holes import HoleAddresses

STEPS_A_POOL = 5_000
STEPS_A_CHECK = 100


def soak(strategy: str, steps: int, seed: int) -> None:
    """Run ``steps`` random steps of ``strategy``; an `AssertionError` names the first step at which
    allocator and bitmap disagree.
    """
    before = HoleAddresses.STRETCH_BLOCKS
    rng = random.Random(f"{strategy} {seed}")
    step = 0
    try:
        while step < steps:
            HoleAddresses.STRETCH_BLOCKS = 1 << rng.randint(1, 9)
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
        HoleAddresses.STRETCH_BLOCKS = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--strategy", choices=sorted({*STRATEGIES, *CASES}), help="default: all")
    given = parser.parse_args()
    failed = False
    all_strategies = [*STRATEGIES, *(CASES.keys() - STRATEGIES.keys())]
    for strategy in [given.strategy] if given.strategy else all_strategies:
        started = time.perf_counter()
        try:
            soak(strategy, given.steps, given.seed)
            found = "as the bitmap says"
        except AssertionError as error:
            failed, found = True, f"FAILED: {error}"
        seconds, ran = time.perf_counter() - started, f"{given.steps:>9,} steps, seed {given.seed}"
        print(f"{strategy:20} {ran}, {seconds:6.1f} s: {found}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
