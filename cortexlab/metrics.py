"""Formulas of the metrics, over time stamps and holdings, and the one table of a result's columns.
Names are those of `vllm bench serve`.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

SHARES = ("token", "reserved", "internal", "external")
RESAMPLES = 2000  # of a bootstrap
PARTS = "matrix products", "attention", "activation", "RoPE", "norms", "writes"  # of a step's time
REST = "the rest"  # of a step's time, in no part
GOODPUTS = (2000, 100), (500, 30)  # limits on TTFT and TPOT, in ms
PREFIX = "param_"  # keeps a swept parameter's column apart from a measured column of that name


# --- columns --------------------------------------------------------------------------------------


Kind = Literal["double", "int64", "string", "doubles", "extents"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result's tables: its type on disk, its words on pages and axes, and its looks
    in printed tables.
    """

    name: str
    words: str | None = None  # on a page; None: the page leaves the column out
    unit: str | None = None  # of the stored value
    axis: str | None = None  # label of a figure's axis; None: the column's name
    clock: Literal["run", "wall"] | None = None  # what decides it; a replay's run is virtual
    interval: bool = False  # a bench stores the ends of a 95 % interval too: `_low` and `_high`
    heading: str | None = None  # of a printed table
    scale: float = 1  # stored units in a printed one
    format: Callable[[Any], str] = str  # of the scaled value in a printed table
    digits: Callable[[Any], float] | None = None  # of `format`, behind the point; None: those seen
    drop: int = 0  # rank among what a narrow terminal loses: the largest goes first, 0 never
    kind: Kind = "double"  # type on disk, also where all values are missing

    @property
    def label(self) -> str:
        """Words with their unit."""
        return f"{self.words} ({self.unit})" if self.unit else self.words

    def text(self, value) -> str:
        """A cell of a printed table."""
        if value is None:
            return "-"
        return self.format(value if self.scale == 1 else value / self.scale)


def _short_seconds(value: float) -> str:
    """Three digits below 100 seconds, whole seconds above."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _short_digits(value: float) -> float:
    """Digits of `_short_seconds` behind the point, with the zeros at the end that it leaves out.
    A printed 0 is exact.
    """
    return max(0, 2 - int(f"{value:.2e}".partition("e")[2])) if value else math.inf


_timed = partial(Column, clock="run", interval=True)
_ms = partial(_timed, unit="ms")
_seconds = partial(_ms, scale=1000, format="{:.2f}".format)  # stored in ms, printed in seconds
_whole = partial(Column, kind="int64")
_share = partial(Column, format="{:.1%}".format)
_weighted = partial(_share, clock="run")  # each step weighted by its duration
_count = "{:.0f}".format


def goodput_name(ttft: float, tpot: float) -> str:
    """The column of goodput under limits in ms."""
    return f"goodput_{ttft:g}_{tpot:g}"


def _goodput(ttft: float, tpot: float) -> Column:
    first = f"{ttft:g} ms" if ttft < 1000 else f"{ttft / 1000:g} s"
    words = f"requests/s in time ({first}, {tpot:g} ms"
    return Column(goodput_name(ttft, tpot), f"{words})", axis=f"{words} a token)")


_WHOLE = (
    *("num_blocks", "batch_size", "requests", "refused", "completed", "completed_by_last_arrival"),
    *("failed", "tokens", "total_input_tokens", "total_output_tokens", "cached_tokens"),
    *("arena_bytes", "requests_identical", "requests_near_tie", "repeats"),
    *("repeat", "prompt_tokens", "output_tokens"),
    *("num_running", "num_waiting", "num_prefill_tokens", "num_decode_tokens"),
    *(f"{name}_slots" for name in (*SHARES, "pool")),
    *("free_blocks", "used_blocks", "largest_free_run"),
)
_REAL = (
    *("max_gap", "mean_live_tokens", "prefix_hit_tokens_rate", "empty_share"),
    *("arrived_at", "scheduled_at", "first_token_at", "finished_at"),
    *("ttft_ms", "tpot_ms", "e2el_ms", "started_at", "ended_at", "host_s"),
)
_TEXT = ("tokens_sha256", "request", "state", "finish_reason", "error")

# In the order of a page; columns that are shown nowhere come last.
COLUMNS = {
    column.name: column
    for column in (
        Column("strategy", heading="strategy", kind="string"),
        _whole("block_size", axis="block size (slots)", heading="block"),
        Column("request_rate", axis="requests arriving per second"),
        _whole("max_batch_size", axis="requests run at once, at most"),
        _timed("duration"),
        _timed("request_throughput", "requests/s"),
        _timed(
            "output_throughput",
            "output tokens/s",
            axis="output tokens per second",
            heading="tok/s",
            format="{:.1f}".format,
        ),
        _seconds(
            "mean_ttft_ms",
            "TTFT, mean",
            axis="mean time to first token (ms)",
            heading="mean TTFT s",
            format=_short_seconds,
            digits=_short_digits,
        ),
        _seconds("median_ttft_ms", "TTFT, median", heading="TTFT s", drop=1),
        _seconds("p99_ttft_ms", "TTFT, p99", heading="p99", drop=5),
        _ms("mean_tpot_ms"),
        _ms("median_tpot_ms", "TPOT, median", heading="TPOT ms", format=_count, drop=1),
        _ms("p99_tpot_ms"),
        _ms("mean_itl_ms"),
        _ms("median_itl_ms"),
        _ms("p99_itl_ms", "ITL, p99", heading="ITL p99", format=_count, drop=6),
        _ms("mean_e2el_ms"),
        _ms("median_e2el_ms"),
        _ms("p99_e2el_ms"),
        *(_goodput(*limits) for limits in GOODPUTS),
        _weighted(
            "token_share",
            "token share",
            axis="share of the memory that is tokens",
            heading="token",
        ),
        _weighted("reserved_share", "reserved share", heading="reserv", drop=2),
        _weighted("internal_share", "internal share", heading="intern"),
        _weighted("external_share", "external share", heading="extern"),
        Column(
            "external_fragmentation",
            "external fragmentation",
            clock="run",
            heading="frag",
            format="{:.2f}".format,
            drop=3,
        ),
        Column("num_holes", clock="run"),
        Column("utilization", "utilization", heading="util", format="{:.3f}".format, drop=1),
        Column(
            "extents_per_sequence",
            "extents a sequence",
            axis="extents a sequence",
            heading="ext/seq",
            format="{:.1f}".format,
        ),
        _share("long_extent_share", "tokens in long extents", "share", heading="long"),
        Column("prefix_hit_rate", "prefix hits", "share", heading="hits", format="{:.2%}".format),
        _whole("copied_bytes", "copied", "bytes"),
        _whole("copied_blocks", "copied", "blocks"),
        _share("copied_share", heading="copied", drop=1),
        _whole("peak_blocks", heading="peak", drop=4),
        _whole(
            "peak_kv_bytes",
            "peak KV",
            "bytes",
            heading="peak MiB",
            scale=1 << 20,
            format=_count,
        ),
        _whole("num_preemptions", "preemptions", heading="preempt", drop=7),
        Column("median_host_us", clock="run"),
        Column("host_share", clock="run"),
        Column("seconds", clock="wall", heading="s", format="{:.1f}".format, drop=8),
        Column("point_seconds", clock="wall"),
        *map(_whole, _WHOLE),
        *map(Column, _REAL),
        *(Column(name, kind="string") for name in _TEXT),
        Column("itl_ms", kind="doubles"),  # of a request: gaps between its tokens
        Column(
            "extents", kind="extents"
        ),  # of a step: [[request number, first block, blocks], ...]
    )
}


def column_of(name: str) -> Column | None:
    """The column that ``name`` is, or of whose interval ``name`` is an end."""
    return COLUMNS.get(name.removesuffix("_low").removesuffix("_high"))


def kind_of(name: str) -> Kind | None:
    """The type on disk of a column or of an end of its interval; None for an unknown column."""
    column = column_of(name)
    return "double" if column and name != column.name else column and column.kind


# --- formulas -------------------------------------------------------------------------------------


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
    """Completed requests a second whose TTFT and TPOT are at most ``ttft`` and ``tpot`` seconds.

    ``requests``: ``arrived_at, first_token_at, finished_at`` in seconds, ``output_tokens`` and
    ``state`` (DistServe, OSDI 2024).
    """
    gaps = (requests["output_tokens"] - 1).clip(lower=1)  # a single token has a TPOT of 0 here
    each = (requests["finished_at"] - requests["first_token_at"]) / gaps
    kept = (
        (requests["state"] == "finished")
        & (requests["first_token_at"] - requests["arrived_at"] <= ttft)
        & (each <= tpot)
    )
    return float(kept.sum() / duration)


def counted_latency_summary(latency: dict[str, Counter]) -> dict[str, float | None]:
    """`latency_summary` of latencies in nanoseconds with their counts, equal to the last bit on any
    machine.
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
    """Quantile of sorted ``(value, count)`` pairs, linear between neighbours as in NumPy."""
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
    token; *reserved*: empty slots that the sequence goes on to fill; *internal*: all other empty
    slots; *external*: free slots, enough in number but not usable.
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
    """``{token,reserved,internal,external}_share``: each step's part of H + X, weighted by the
    step's seconds, without steps where H + X = 0.
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


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the median (Efron 1979), from a fixed seed; None for
    fewer than two values.
    """
    if len(values) < 2:
        return None
    rng = np.random.default_rng(0)
    medians = np.median(
        rng.choice(np.asarray(values, dtype=float), (RESAMPLES, len(values))), axis=1
    )
    low, high = np.quantile(medians, [0.025, 0.975])
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
