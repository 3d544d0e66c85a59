"""The command `allocbench`: what it takes, and its figures as one document or as a table. How they
are measured: `allocator_cost`.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from itertools import product
from statistics import median
from types import ModuleType

from tqdm import tqdm

from ..allocators import STRATEGIES, check_names
from ..bench.allocator_cost import (
    OPERATIONS,
    PAIR,
    PEERS,
    ROUNDS,
    TURNOVER,
    Pool,
    find_peer,
    measure,
    peer_pool,
    pool_of,
    with_turnover,
)
from ..bench.environment import machine
from ..errors import BadInput, at_least, share
from .options import numbers_of, strategy_named

LARGEST_POOL = 1 << 22  # the peer takes half a kilobyte a block
WIDTH = 80  # columns of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join((*STRATEGIES, *PEERS))
    add(
        "--strategies",
        help=(
            f"comma-separated: {names}, or module:Factory of your own (default: all, the peer "
            "where installed)"
        ),
    )
    add("--num-blocks", default="2048,32768,1048576", help="comma-separated pool sizes, in blocks")
    add("--occupancy", default="0,0.5,0.9", help="comma-separated shares of the pool in use")
    add(
        "--request-blocks",
        type=int,
        default=32,
        help="blocks of the measured request, and median of those around it",
    )
    add("--seed", type=int, default=0, help="seed of sizes and of the order of freeing")
    add("--json", action="store_true", help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> tuple[int, str]:
    peer = find_peer()
    strategies = _strategies(args.strategies, peer)
    sizes = numbers_of("num_blocks", args.num_blocks)
    sizes = [at_least("num_blocks", size, 1, LARGEST_POOL) for size in sizes]
    at_least("request_blocks", args.request_blocks, 1, min(sizes))
    at_least("seed", args.seed, 0)
    occupancies = numbers_of("occupancy", args.occupancy, float)
    occupancies = [share("occupancy", each) for each in occupancies]
    total = len(sizes) * len(occupancies) * len(strategies) * ROUNDS
    with tqdm(total=total, unit="round", file=sys.stderr, disable=None, leave=False) as bar:
        rows, pools = measure(
            strategies, sizes, occupancies, args.request_blocks, args.seed, bar.update
        )
    document = {
        "environment": environment(peer),
        "rows": rows,
        "ratios": ratios(rows),
        "pools": pools,
    }
    return 0, json.dumps(document, allow_nan=False) if args.json else report(document)


def _strategies(names: str | None, peer: ModuleType | None) -> dict[str, Callable[[int], Pool]]:
    """By name, the function that makes a pool of n blocks."""
    every = (*STRATEGIES, *(PEERS if peer else ()))
    given = map(str.strip, names.split(",")) if names is not None else every
    strategies = [strategy_named(name, PEERS) for name in given]
    makers = {}
    for name, strategy in zip(check_names(strategies), strategies, strict=True):
        if strategy not in PEERS:
            makers[name] = partial(pool_of, strategy)
        elif peer is None:
            raise BadInput(
                f"strategy {name!r} needs the package vllm-mlx, which is not installed here"
            )
        else:
            makers[name] = partial(peer_pool, peer, name)
    return makers


def environment(peer: ModuleType | None) -> dict:
    """`machine`, and the peer's version."""
    return machine() | {"vllm_mlx_version": _peer_version() if peer else None}


def _peer_version() -> str | None:
    try:
        return metadata.version("vllm-mlx")
    except metadata.PackageNotFoundError:
        return None


def ratios(rows: Sequence[dict]) -> list[dict]:
    """Each row's median by its median in the smallest pool, and by the peer's in a pool of equal
    size.
    """
    at = _medians(rows)
    smallest = min(row["num_blocks"] for row in rows)
    return [
        {"strategy": name, "num_blocks": num_blocks, "occupancy": occupancy, "operation": operation}
        | {"to_smallest_pool": _over(value, at[name, smallest, occupancy, operation])}
        | {
            f"to_{peer}": _over(value, at.get((peer, num_blocks, occupancy, operation)))
            for peer in PEERS
        }
        for (name, num_blocks, occupancy, operation), value in at.items()
    ]


def report(document: dict) -> str:
    """A block an operation: strategies down, occupancies across, each in the smallest and the
    largest pool and as their ratio.
    """
    rows, where = document["rows"], document["environment"]
    names, sizes, occupancies = (
        list(dict.fromkeys(row[key] for row in rows))
        for key in ("strategy", "num_blocks", "occupancy")
    )
    small, large = min(sizes), max(sizes)
    machine = (
        f"Medians in microseconds; {where['cores']} cores of {where['processor']}, Python "
        f"{where['python_version']}"
    )
    lines = [
        textwrap.shorten(machine, WIDTH),
        f"Requests of {rows[0]['request_blocks']} blocks; turnover, a request: two of many sizes "
        "leave, two come.",
    ]
    medians = _medians(with_turnover(rows, document["pools"]))
    for operation, first in product((*OPERATIONS, TURNOVER), range(0, len(occupancies), 3)):
        shares = occupancies[first : first + 3]
        lines += ["", *_block(medians, operation, names, shares, small, large)]
    findings = (textwrap.fill(line, WIDTH) for line in _findings(document, small, large))
    return "\n".join([*lines, "", *findings])


def _medians(rows: Sequence[dict]) -> dict[tuple, float | None]:
    """Microseconds by strategy, pool, occupancy and operation."""
    keys = "strategy", "num_blocks", "occupancy", "operation"
    return {tuple(row[key] for key in keys): row["median_us"] for row in rows}


def _block(
    medians: dict[tuple, float | None],
    operation: str,
    names: Sequence[str],
    occupancies: Sequence[float],
    small: int,
    large: int,
) -> Iterator[str]:
    """An operation's lines: two of heading, one a strategy."""
    in_use = (f"{100 * occupancy:.4g} % in use" for occupancy in occupancies)
    yield f"{operation:<18}" + "".join(f"{text:>20}" for text in in_use)
    two = small != large
    yield " " * 18 + (f"{small:>7}{large:>8}{'x':>5}" if two else f"{small:>20}") * len(occupancies)
    for name in names:
        line = f"{name if len(name) <= 18 else name[:17] + '…':<18}"
        for occupancy in occupancies:
            low, high = (medians[name, size, occupancy, operation] for size in (small, large))
            both = f"{_short(low):>7}{_short(high):>8}{_short(_over(high, low)):>5}"
            line += both if two else f"{_short(low):>20}"
        yield line


def _findings(document: dict, small: int, large: int) -> Iterator[str]:
    """How cortexlab's strategies relate to the peer and to the small pool, and how much the figures
    scatter.
    """
    ours = [
        r
        for r in document["ratios"]
        if r["num_blocks"] == large and r["operation"] == PAIR and r["strategy"] not in PEERS
    ]

    def spread(key: str) -> str | None:
        found = sorted((ratio[key], ratio["strategy"]) for ratio in ours if ratio[key] is not None)
        return (
            f"{_short(found[0][0])} ({found[0][1]}) to {_short(found[-1][0])} ({found[-1][1]})"
            if found
            else None
        )

    parts = [f"{span} of the time of {peer}" for peer in PEERS if (span := spread(f"to_{peer}"))]
    if small != large and (span := spread("to_smallest_pool")):
        parts.append(f"{span} times what they take at {small}")
    if parts:
        yield f"At {large} blocks allocate + free of ours take {'; '.join(parts)}."
    if not document["environment"]["vllm_mlx_version"]:
        yield "vllm-mlx is not installed, so it is not compared."
    scatter = sorted(
        row["p99_us"] / row["median_us"]
        for row in document["rows"]
        if row["operation"] == PAIR and row["p99_us"]
    )
    if scatter:
        middle, worst = _short(median(scatter)), _short(scatter[-1])
        yield (
            f"The 99th percentile of batches of allocate + free is {middle} times the median, at "
            f"worst {worst} times."
        )
    yield "-: never extends, occupancy out of reach, or too little to measure."


def _over(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value / base


def _short(value: float | None) -> str:
    return (
        "-"
        if value is None
        else f"{value:.2f}"
        if value < 9.995
        else f"{value:.1f}"
        if value < 99.95
        else f"{value:.0f}"
    )
