"""A stopwatch for works that are compared: measured in turn, so that noise hits all alike."""

from collections.abc import Callable, Hashable, Mapping
from time import perf_counter


def in_turn(
    works: Mapping[Hashable, Callable[[], object]], repeats: int
) -> dict[Hashable, list[float]]:
    """Seconds of each of ``works`` in ``repeats`` turns, by name. One turn before them warms up and
    is not counted. A work evaluates its own arrays.
    """
    for work in works.values():
        work()
    seconds = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started_at = perf_counter()
            work()
            seconds[name].append(perf_counter() - started_at)
    return seconds
