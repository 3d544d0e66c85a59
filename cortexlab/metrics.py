"""Metrics are formulas over time stamps and holdings; this file is the table of them. Names are
those of `vllm bench serve`.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import pandas as pd

SHARES = ("token", "reserved", "internal", "external")
PARTS = "matrix products", "attention", "activation", "RoPE", "norms", "writes"  # of a step's time
REST = "the rest"


class Stamped(Protocol):
    """A request with its time stamps, in seconds."""

    arrived_at: float
    token_times: Sequence[float]


def latencies(request: Stamped) -> dict[str, float | list[float] | None]:
    """One finished request's TTFT, TPOT, E2E and gaps between tokens (ITL), in seconds.

    TTFT counts from arrival, queueing included; TPOT = (E2E - TTFT) / (n - 1), None for a single
    token.
    """
    times = request.token_times
    ttft, e2el = times[0] - request.arrived_at, times[-1] - request.arrived_at
    return {
        "ttft": ttft,
        "tpot": (e2el - ttft) / (len(times) - 1) if len(times) > 1 else None,
        "e2el": e2el,
        "itl": [after - before for before, after in pairwise(times)],
    }


def latency_summary(requests: Iterable[Stamped]) -> dict[str, float | None]:
    """``{mean,median,p99}_{ttft,tpot,itl,e2el}_ms`` over requests; ITL pools the gaps of all
    tokens. None where nothing applies.
    """
    each = [latencies(request) for request in requests]
    pools = {
        name: [row[name] for row in each if row[name] is not None]
        for name in ("ttft", "tpot", "e2el")
    }
    pools["itl"] = [gap for row in each for gap in row["itl"]]
    summary = {}
    for name in ("ttft", "tpot", "itl", "e2el"):
        values = np.array(pools[name]) * 1000
        for statistic, of in (
            ("mean", np.mean),
            ("median", np.median),
            ("p99", lambda v: np.percentile(v, 99)),
        ):
            summary[f"{statistic}_{name}_ms"] = float(of(values)) if len(values) else None
    return summary


def goodput(requests: pd.DataFrame, duration: float, ttft: float, tpot: float) -> float:
    """Completed requests a second that keep both promises: first token within ``ttft`` seconds,
    then ``tpot`` a token on average.

    ``requests``: ``arrived_at, first_token_at, finished_at`` in seconds, ``output_tokens`` and
    ``state`` (DistServe, OSDI 2024).
    """
    behind = (requests["output_tokens"] - 1).clip(
        lower=1
    )  # of a single token there is no time per token: 0
    each = (requests["finished_at"] - requests["first_token_at"]) / behind
    kept = (
        (requests["state"] == "finished")
        & (requests["first_token_at"] - requests["arrived_at"] <= ttft)
        & (each <= tpot)
    )
    return float(kept.sum() / duration)


def counted_latency_summary(latency: dict[str, Counter]) -> dict[str, float | None]:
    """`latency_summary` of nanoseconds, each with how often it occurs; the same to the last bit on
    any machine.
    """
    summary = {}
    for name, counted in latency.items():
        pairs = sorted(pair for pair in counted.items() if pair[1])
        count = sum(n for _, n in pairs)
        mean = math.fsum(value * n for value, n in pairs) / count if count else None
        for statistic, value in (
            ("mean", mean),
            ("median", counted_quantile(pairs, count, 0.5)),
            ("p99", counted_quantile(pairs, count, 0.99)),
        ):
            summary[f"{statistic}_{name}_ms"] = None if value is None else value / 1e6
    return summary


def counted_quantile(pairs: list[tuple[float, int]], count: int, q: float) -> float | None:
    """Of sorted ``(value, how often)`` pairs, linear between neighbours as NumPy's default."""
    if not count:
        return None
    place = q * (count - 1)
    below, seen, low = math.floor(place), 0, None
    for value, n in pairs:
        seen += n
        if low is None and seen > below:
            low = value
        if seen > min(below + 1, count - 1):
            return low + (value - low) * (place - below)
    return low


def step_shares(held: Iterable[tuple[int, int, int]], unusable_slots: int = 0) -> dict[str, int]:
    """The four shares of KV memory in one step, as slots.

    ``held`` gives ``(slots, tokens, tokens at its end)`` of each sequence. *token*: slots with a
    token; *reserved*: empty ones their sequence goes on to fill; *internal*: the other empty ones;
    *external*: free slots that were enough, but not usable.
    """
    slots = dict.fromkeys(SHARES, 0)
    for num_slots, num_tokens, final_tokens in held:
        filled = min(num_slots, final_tokens)
        slots["token"] += num_tokens
        slots["reserved"] += filled - num_tokens
        slots["internal"] += num_slots - filled
    slots["external"] = unusable_slots
    return slots


def shares(steps: Iterable[tuple[float, dict[str, float]]]) -> dict[str, float | None]:
    """``{token,reserved,internal,external}_share``: each step's part of H + X, weighted by its
    seconds; empty steps left out.
    """
    total, weight = dict.fromkeys(SHARES, 0.0), 0.0
    for seconds, slots in steps:
        room = sum(slots.values())
        if room:
            weight += seconds
            for name in SHARES:
                total[name] += seconds * slots[name] / room
    return {f"{name}_share": total[name] / weight if weight else None for name in SHARES}


def weighted_mean(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Mean of ``(weight, value)`` pairs."""
    pairs = list(pairs)
    weight = math.fsum(w for w, _ in pairs)
    return math.fsum(w * value for w, value in pairs) / weight if weight else None


def tokens_sha256(outputs: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the compact JSON text of the output token lists in order of submission."""
    text = json.dumps([list(map(int, tokens)) for tokens in outputs], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def median_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 2000
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the median (Efron 1979), by a fixed seed; None for fewer
    than two values.
    """
    if len(values) < 2:
        return None
    rng = np.random.default_rng(0)
    medians = np.median(
        rng.choice(np.asarray(values, dtype=float), (resamples, len(values))), axis=1
    )
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratio_summary(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | int]:
    """Ratios of alternating repeats, pair by pair: ``median, min, max, n``."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "n": len(ratios),
    }
