"""How often a bench names a winner among equals, and finds a strategy slowed by a fifth. Takes an
hour on two quiet cores.

    python tests/soak_recommendation.py [--benches 40] [--only WORDS]

Names for one allocator share the work of `bench --model tiny --requests 10 --batch-size 4`. The
exit code is 1 when more than one bench in eight has a winner among equals, or fewer than four in
five find the slowed one where the standard deviation of a log ratio is at most .06. On a machine so
busy that no bench is that quiet, nothing is said about finding.
"""

import argparse
import sys
import time

import cortexlab  # noqa: F401 - first, so that the optimized BLAS is in place before MLX
from cortexlab import answer
from cortexlab.allocators.paged import Paged
from cortexlab.bench import serve, summary
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.bench.summary import Bench, recommendation
from cortexlab.host.models import load_model, model_limits
from cortexlab.workloads import make_workload

CASES = [(len(names), repeats) for names in ("ab", "abcde") for repeats in (3, 5, "auto")]
QUIET = 0.06  # standard deviation of a log ratio up to which the slowed one is to be found
SLOWER = 1.2  # the slowed one takes this much longer


class SlowEngine(serve.Engine):
    """An engine whose steps take longer where its allocator is called slow."""

    def __init__(self, *args, strategy, **options):
        super().__init__(*args, strategy=strategy, **options)
        self.strategy_name = strategy.__name__

    def step(self):
        started_at = time.perf_counter()
        events = super().step()
        if self.strategy_name == "slow":
            time.sleep((SLOWER - 1) * (time.perf_counter() - started_at))
        return events


def named(name: str) -> type[Paged]:
    """The paged allocator under a name of its own."""
    return type(name, (Paged,), {})


def benches(count: int, names: list[str], repeats: int | str):
    """``count`` benches of one allocator under ``names``."""
    model = load_model("tiny")[0]
    items = make_workload("chat", 10, context=model_limits(model)[0])
    factories = [named(name) for name in names]
    for _ in range(count):
        yield run_bench(model, items, factories, Setting(batch_size=4), repeats=repeats)


def has_winner(bench: Bench) -> bool:
    text = recommendation(bench)
    return "faster than" in text or "memory decides" in text


def found(bench: Bench) -> bool:
    """Whether the slowed one is told apart from each other one."""
    others = (name for name in bench.comparison.speeds if name != "slow")
    return all(bench.comparison.between(name, "slow").faster for name in others)


def equals(count: int, num_names: int, repeats: int | str) -> bool:
    """Print how many benches of equals have a winner; whether these are few."""
    wrong, noise, used = 0, [], []
    for bench in benches(count, list("abcde"[:num_names]), repeats):
        wrong += has_winner(bench)
        noise.append(bench.comparison.sd_log_ratio)
        used.append(bench.comparison.repeats)
    print(
        f"{num_names} equals, repeats {repeats}: a winner in {wrong} of {count} benches; "
        f"{_noise(noise)}; {sum(used) / count:.1f} repeats on average",
        flush=True,
    )
    return wrong <= count // 8


def slowed(count: int, num_names: int, repeats: int | str) -> bool:
    """Print how many benches find the slowed one; whether enough of the quiet ones do."""
    names = [*"abcd"[: num_names - 1], "slow"]
    quiet, noise, all_found = [], [], 0
    for bench in benches(count, names, repeats):
        noise.append(bench.comparison.sd_log_ratio)
        all_found += found(bench)
        if noise[-1] <= QUIET:
            quiet.append(found(bench))
    print(
        f"{num_names} names, one slower by {SLOWER - 1:.0%}, repeats {repeats}: found in "
        f"{all_found} of {count} benches, in {sum(quiet)} of {len(quiet)} quiet ones; "
        f"{_noise(noise)}",
        flush=True,
    )
    return sum(quiet) >= 0.8 * len(quiet)


def _noise(each: list[float]) -> str:
    ordered = sorted(each)
    return (
        f"standard deviation of a log ratio {ordered[0]:.3f} to {ordered[-1]:.3f}, median "
        f"{ordered[len(ordered) // 2]:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--benches", type=int, default=40)
    parser.add_argument("--only", default="", help="words of a case, as 'equals 2 3'")
    args = parser.parse_args()
    serve.Engine = SlowEngine
    known: dict[tuple, object] = {}
    real = summary.first_difference

    def checked_once(model, prompt, tokens):
        key = tuple(prompt), tuple(tokens)
        if key not in known:
            known[key] = real(model, prompt, tokens)
        return known[key]

    summary.first_difference = checked_once  # the tokens are the same in all benches
    held = True
    for job, cases in ((equals, CASES), (slowed, [(2, 5), (5, 5), (2, "auto")])):
        for case in cases:
            if args.only in f"{job.__name__} {case[0]} {case[1]}":
                held &= job(args.benches, *case)
    print(f"error of a bench: {answer.ERROR}; {'held' if held else 'DID NOT HOLD'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
