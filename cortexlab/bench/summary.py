"""What a bench says: tables of its runs, one row a strategy, ratios to mlx-lm, and a
recommendation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.nn as nn
import pandas as pd

from .. import answer, metrics
from ..engine.records import StepRecord
from ..options import MLX_LM
from ..replay.step_time import StepTime
from ..scheduler.request import Request, RequestState
from .mlx_lm import CacheUse, first_difference

TIMED = tuple(name for name, column in metrics.COLUMNS.items() if column.interval)


@dataclass(slots=True, kw_only=True)
class Run:
    """One strategy on the workload, once."""

    strategy: str
    requests: list[Request]
    started_at: float  # on the clock of the requests' time stamps
    duration: float
    steps: list[dict]
    num_blocks: int | None = None
    block_size: int | None = None
    arena_bytes: int | None = None
    copied_bytes: int | None = None
    num_preemptions: int | None = None
    peak_kv_bytes: int = 0
    prefix_hit_rate: float | None = None

    @property
    def finished(self) -> list[Request]:
        return [each for each in self.requests if each.state is RequestState.FINISHED]

    @property
    def output_tokens(self) -> int:
        return sum(len(request.output_tokens) for request in self.requests)

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.duration


@dataclass(slots=True)
class Bench:
    """All runs of a workload, and the tables made of them."""

    runs: list[Run] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    ratios: list[dict] = field(default_factory=list)
    looks: list[dict] = field(default_factory=list)  # of a bench that went on until it knew
    error: float = answer.ERROR  # what its last look left for the comparison

    @property
    def comparison(self) -> answer.Comparison:
        """The strategies' speeds, repeat by repeat."""
        names = dict.fromkeys(run.strategy for run in self.runs)
        speeds = {name: [run.throughput for run in self.of(name)] for name in names}
        return answer.Comparison(speeds, self.error)

    @property
    def held(self) -> bool:
        """Whether every request finished, with the reference's tokens or a near tie."""
        same = (row["requests_identical"] + row["requests_near_tie"] for row in self.rows)
        ended = all(len(run.finished) == len(run.requests) for run in self.runs)
        completed = [row["completed"] for row in self.rows]
        return ended and completed == list(same)

    def of(self, strategy: str) -> list[Run]:
        """The runs of one strategy, in order."""
        return [run for run in self.runs if run.strategy == strategy]

    def steps(self) -> pd.DataFrame:
        """One row a step of every run; times in seconds from the start of the run."""
        return pd.DataFrame([which | step for which, run in self._numbered() for step in run.steps])

    def requests(self) -> pd.DataFrame:
        """One row a request of every run; times in seconds from the start of the run."""
        return pd.DataFrame(
            [
                which | _request(request, run.started_at)
                for which, run in self._numbered()
                for request in run.requests
            ]
        )

    def step_time(self) -> tuple[StepTime, dict] | None:
        """Seconds a step as tokens and sequences explain them, over all steps of our engine, and
        how well; None without any.
        """
        steps = [
            (
                step["ended_at"] - step["started_at"],
                step["num_prefill_tokens"] + step["num_decode_tokens"],
                step["num_running"],
            )
            for run in self.runs
            if run.strategy != MLX_LM
            for step in run.steps
        ]
        if not steps:
            return None
        fitted, r_squared = StepTime.fit(steps)
        return fitted, {"r_squared": r_squared, "num_steps": len(steps)}

    def _numbered(self) -> Iterator[tuple[dict, Run]]:
        seen: dict[str, int] = {}
        for run in self.runs:
            seen[run.strategy] = seen.get(run.strategy, -1) + 1
            yield {"strategy": run.strategy, "repeat": seen[run.strategy]}, run


def engine_step(record: StepRecord, start: float, block_size: int, fills: dict) -> dict:
    """A step of our engine. ``fills``: tokens at the end of each hold, by request id."""
    held = []
    for each in record.held:
        final = fills[each.request_id][each.hold] - each.num_skipped
        num_slots, *filled = (
            count - each.num_counted
            for count in (each.num_slots, each.num_tokens, min(final, each.num_slots))
        )
        held.append((num_slots, *(count * each.layer_share for count in filled)))
    slots = metrics.step_shares(held, record.unusable_slots)
    return {
        **_time_and_load(record, start),
        "host_s": record.host_s,
        "num_prefill_tokens": record.num_prefill_tokens,
        "num_decode_tokens": record.num_decode_tokens,
        **{f"{name}_slots": count for name, count in slots.items()},
        "pool_slots": (record.pool.used_blocks + record.pool.free_blocks) * block_size,
        **record.pool,
        "copied_bytes": record.copied_bytes,
        "extents": [  # [[request number, first block, blocks], ...]
            [int(each.request_id[1:]), extent.start, extent.num_blocks]
            for each in record.held
            for extent in each.extents
        ],
    }


def mlx_lm_step(use: CacheUse, start: float, slot_bytes: int) -> dict:
    """A step of mlx-lm's own batching."""
    return {
        **_time_and_load(use, start),
        "token_slots": use.num_tokens,
        "reserved_slots": 0,
        "internal_slots": use.nbytes // slot_bytes - use.num_tokens,
        "external_slots": 0,
    }


def _time_and_load(step: StepRecord | CacheUse, start: float) -> dict:
    """The columns that steps of every strategy have."""
    return {
        "started_at": step.started_at - start,
        "ended_at": step.ended_at - start,
        "num_running": step.num_running,
        "num_waiting": step.num_waiting,
    }


def strategy_row(
    runs: list[Run],
    num_refused: int,
    batch_size: int,
    prefix_caching: bool,
    model: nn.Module,
    references: dict,
) -> dict:
    """One strategy's row: counts of the first run, medians over all, and a 95 % interval for what
    is timed. ``references`` keeps what `first_difference` found, for outputs that come again.
    """
    first = runs[0]
    each = pd.DataFrame([_measures(run) for run in runs]).astype(float)
    medians = {name: None if pd.isna(value) else value for name, value in each.median().items()}
    cached = sum(request.cached_tokens for request in first.requests) if prefix_caching else None
    row = {
        "strategy": first.strategy,
        "block_size": first.block_size,
        "num_blocks": first.num_blocks,
        "batch_size": batch_size,
        "completed": len(first.finished),
        "refused": num_refused,
        "total_input_tokens": sum(len(request.prompt) for request in first.requests),
        "total_output_tokens": first.output_tokens,
        **medians,
        "copied_bytes": first.copied_bytes,
        "peak_kv_bytes": max(run.peak_kv_bytes for run in runs),
        "arena_bytes": first.arena_bytes,
        "num_preemptions": first.num_preemptions,
        "prefix_hit_rate": first.prefix_hit_rate,
        "cached_tokens": cached,
        "tokens_sha256": metrics.tokens_sha256([each.output_tokens for each in first.requests]),
        **equality(runs, model, references),
        "repeats": len(runs),
    }
    for name in TIMED:
        interval = metrics.median_interval(each[name].dropna().tolist())
        row[f"{name}_low"], row[f"{name}_high"] = interval or (None, None)
    return row


def equality(runs: list[Run], model: nn.Module, references: dict) -> dict:
    """How the outputs compare to the unmodified model's greedy choice; the worst of the repeats
    counts.
    """
    counts = []
    for run in runs:
        identical, near_tie, gaps = 0, 0, [0.0]
        for request in run.finished:
            whole = len(request.output_tokens) == request.max_tokens
            if request.finish_reason != "stop" and not whole:
                continue
            key = (request.prompt, tuple(request.output_tokens))
            if key not in references:
                references[key] = first_difference(model, request.prompt, request.output_tokens)
            difference = references[key]
            identical += difference is None
            near_tie += difference is not None and difference.near_tie
            gaps += [] if difference is None else [difference.gap]
        counts.append((identical + near_tie, identical, max(gaps)))
    held, identical, _ = min(counts)
    return {
        "requests_identical": identical,
        "requests_near_tie": held - identical,
        "max_gap": max(gap for *_, gap in counts),
    }


def ratios(bench: Bench, names: Sequence[str]) -> list[dict]:
    """Throughput of each strategy over mlx-lm's, repeat by repeat."""
    if MLX_LM not in names:
        return []
    throughput = {name: [run.throughput for run in bench.of(name)] for name in names}
    return [
        {
            "strategy": name,
            "baseline": MLX_LM,
            "output_throughput": metrics.ratio_summary(throughput[name], throughput[MLX_LM]),
        }
        for name in names
        if name != MLX_LM
    ]


def _request(request: Request, started_at: float) -> dict:
    done = request.state is RequestState.FINISHED
    latency = dict.fromkeys(("ttft", "tpot", "e2el", "itl"))
    if done:
        latency = metrics.latencies(request)
    stamps = ("arrived_at", "scheduled_at", "first_token_at", "finished_at")
    at = {name: getattr(request, name) for name in stamps}
    ms = {name: latency[name] for name in ("ttft", "tpot", "e2el")}
    return {
        "request": request.id,
        "state": str(request.state),
        "prompt_tokens": len(request.prompt),
        "output_tokens": len(request.output_tokens),
        **{name: None if value is None else value - started_at for name, value in at.items()},
        **{f"{name}_ms": None if value is None else value * 1000 for name, value in ms.items()},
        "itl_ms": [gap * 1000 for gap in latency["itl"]] if done else None,
        "num_preemptions": request.num_preemptions,
        "finish_reason": request.finish_reason,
        "error": request.error,
    }


def _measures(run: Run) -> dict:
    """What differs from run to run: times, shares weighted by time, and host time of the steps
    without prompts (median, and its share of all their time).
    """
    timed = [(step["ended_at"] - step["started_at"], step) for step in run.steps]
    decoding = [
        (seconds, step["host_s"])
        for seconds, step in timed
        if "host_s" in step and not step["num_prefill_tokens"]
    ]
    host = pd.DataFrame(decoding, columns=["seconds", "host_s"])
    spent = host["seconds"].sum()
    return {
        "duration": run.duration,
        "request_throughput": len(run.finished) / run.duration,
        "output_throughput": run.throughput,
        **metrics.latency_summary(run.finished),
        **_shares(run),
        **{
            name: metrics.weighted_mean((s, step[name]) for s, step in timed if name in step)
            for name in ("external_fragmentation", "num_holes")
        },
        "median_host_us": host["host_s"].median() * 1e6 if len(host) else None,
        "host_share": host["host_s"].sum() / spent if spent else None,
    }


def recommendation(bench: Bench) -> str:
    """The sentence about a bench."""
    shares = {
        name: [_shares(run)["token_share"] or 0 for run in bench.of(name)]
        for name in bench.comparison.pooled
    }
    memory = answer.Comparison(shares, bench.error)  # of the same look as speed
    return answer.recommendation(bench.rows, bench.comparison, memory, auto=bool(bench.looks))


def _shares(run: Run) -> dict:
    """The four shares of a run, each step weighted by its time."""
    timed = ((step["ended_at"] - step["started_at"], step) for step in run.steps)
    return metrics.shares(
        (s, {name: step[f"{name}_slots"] for name in metrics.SHARES}) for s, step in timed
    )
