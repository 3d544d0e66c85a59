"""What a trace is like: span, rate, lengths, and how much of its prompts was seen before."""

from collections.abc import Sequence

import numpy as np

from .synthetic import WorkItem
from .trace_rows import Trace

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def summary(trace: Trace) -> dict:
    """`Trace.described` and figures of its requests; None where there is nothing to measure.

    ``arrival_cv``: standard deviation of the gaps between arrivals over their mean.
    ``repeated_prefix_share``: prompt blocks whose whole prefix an earlier prompt has, of all that
    have a hash id: the hits of a cache without limit.
    """
    items = trace.items
    times = np.array([item.arrived_at for item in items])
    gaps, span = np.diff(times), float(times[-1])
    with_ids = next((item for item in items if item.prefix_ids), None)
    return trace.described() | {
        "span_s": span,
        "request_rate": len(gaps) / span if span else None,
        "arrival_cv": float(gaps.std() / gaps.mean()) if span else None,
        "prompt_tokens": _quantiles([item.prompt_tokens for item in items]),
        "output_tokens": _quantiles([item.output_tokens for item in items]),
        "prefix_block": with_ids and with_ids.prefix_block,
        "repeated_prefix_share": repeated_prefix_share(items),
    }


def repeated_prefix_share(items: Sequence[WorkItem]) -> float | None:
    """Share of prefix ids that an earlier item has; None without ids."""
    seen: set[int] = set()
    num_ids = num_repeated = 0
    for item in items:
        num_ids += len(item.prefix_ids)
        num_repeated += sum(map(seen.__contains__, item.prefix_ids))
        seen.update(item.prefix_ids)
    return num_repeated / num_ids if num_ids else None


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    values = np.quantile(lengths, list(QUANTILES.values()))
    return {name: round(float(value)) for name, value in zip(QUANTILES, values, strict=True)}
