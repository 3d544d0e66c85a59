"""Replays that have run, as data frames."""

from collections.abc import Sequence

import pandas as pd

from .accounting import CountedRequest
from .simulation import Replay
from .step_time import SECOND


def tables(replays: Sequence[Replay]) -> dict[str, pd.DataFrame]:
    """``rows``, ``requests`` (times in seconds of the virtual clock) and ``steps`` (the pool's
    state, sampled) of replays that have run.
    """
    requests, samples = [], []
    for each in replays:
        which = {"strategy": each.strategy.name, "block_size": each.blocks.block_size}
        ends = [sample["started_at"] for sample in each.samples[1:]] + [each.clock.now / SECOND]
        samples += [
            which | {"repeat": 0, "ended_at": end} | sample
            for sample, end in zip(each.samples, ends, strict=True)
        ]
        requests += [which | _request(request) for request in each.requests]
    return {
        "rows": pd.DataFrame([each.row for each in replays]),
        "requests": pd.DataFrame(requests),
        "steps": pd.DataFrame(samples),
    }


def _request(request: CountedRequest) -> dict:
    stamps = {
        "arrived_at": request.arrived_ns,
        "first_token_at": request.first_ns,
        "finished_at": request.finished_ns,
    }
    return {
        "request": request.id,
        "state": str(request.state),
        "prompt_tokens": len(request.prompt),
        "output_tokens": request.output_length,
        **{name: None if at is None else at / SECOND for name, at in stamps.items()},
        "cached_tokens": request.cached_tokens,
        "num_preemptions": request.num_preemptions,
        "error": request.error,
    }
