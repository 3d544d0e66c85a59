"""An exception at every fourth line of a run of the engine, and a second one while the first is
mended; beyond the time of the tests.

    python tests/soak_interrupts.py --stride 4 --pairs 2000 --seed 1

What must hold stands in `interrupts.py`. A failure names the lines, and the exit code is 1.
"""

import argparse
import random
import sys
import time

import cortexlab as cl  # isort: skip - before MLX

from interrupts import MODES, interrupted_run, right_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model, _ = cl.load_model("tiny")
    rng = random.Random(args.seed)
    for mode in MODES:
        right = right_tokens(model, mode)
        began, at, failures, runs = time.monotonic(), 1, [], 0
        while True:
            try:
                if not interrupted_run(model, mode, right, at):
                    break
            except AssertionError as error:
                failures.append(f"line {at}: {error}")
            at, runs = at + args.stride, runs + 1
        for _ in range(args.pairs):
            first, second = rng.randrange(1, at), rng.randrange(1, rng.choice([60, 200, 800, at]))
            try:
                interrupted_run(model, mode, right, first, second)
            except AssertionError as error:
                failures.append(f"lines {first} and {second}: {error}")
        print(
            f"{mode}: {at} lines, {runs} runs with one exception, {args.pairs} with two, "
            f"{len(failures)} failures, {time.monotonic() - began:.0f} s",
            *failures[:5], sep="\n  ", flush=True,
        )  # fmt: skip
        if failures:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
