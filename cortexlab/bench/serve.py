"""The main job: one workload, one real model, every strategy and mlx-lm's own batching, in
alternating repeats.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

import mlx.core as mx
import mlx.nn as nn
import pandas as pd

from .. import metrics
from ..allocators import STRATEGIES, Allocator, blamed_on, check_names, strategy_of
from ..engine.engine import Engine, StepRecord
from ..engine.model_runner import Driver
from ..errors import BadInput, at_least, one_of
from ..host.models import model_limits
from ..replay.step_time import StepTime
from ..scheduler.block_manager import BlockManager
from ..scheduler.request import Request, RequestState
from ..workloads.synthetic import WorkItem, default_max_seq_len, pool_blocks, prompt_tokens
from .doctor import memory_bytes
from .mlx_lm import CacheUse, Difference, first_difference, run_batch_generator, run_one_by_one

MLX_LM = "mlx-lm"
ALL = (*STRATEGIES, MLX_LM)
DEFAULT = (
    "static",
    "cortexstream",
    "paged",
    "runs",
    MLX_LM,
)  # one of each family: fixed, contiguous, scattered, ours
WARMUP_PROMPT, WARMUP_TOKENS = 32, 4  # tokens of each warm-up request
LATENCIES = [
    f"{statistic}_{name}_ms"
    for name in ("ttft", "tpot", "itl", "e2el")
    for statistic in ("mean", "median", "p99")
]
TIMED = ("duration", "request_throughput", "output_throughput", *LATENCIES)


@dataclass(frozen=True, slots=True)
class Setting:
    """What every strategy of one bench run shares. ``num_blocks``: a number, or a percentage of
    `full_pool`.
    """

    block_size: int = 16
    num_blocks: int | str | None = None
    batch_size: int = 8
    max_seq_len: int | None = None
    ignore_eos: bool = True
    seed: int = 0
    prefix_caching: bool = False  # for mlx-lm: its own `LRUPromptCache`
    engine: Mapping = field(default_factory=dict)  # more of `Engine`'s arguments


@dataclass(slots=True)
class Run:
    """One strategy on the workload, once."""

    strategy: str
    requests: list[Request]
    refused: int
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
    def output_tokens(self) -> int:
        return sum(len(request.output_tokens) for request in self.requests)


@dataclass(slots=True)
class Bench:
    """All runs of a workload, and the tables made of them."""

    setting: Setting
    runs: list[Run] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    ratios: list[dict] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether every request ended as it should, with the reference's tokens or a near tie."""
        return all(
            row["completed"] == row["requests_identical"] + row["requests_near_tie"]
            for row in self.rows
        ) and all(
            request.state is RequestState.FINISHED for run in self.runs for request in run.requests
        )

    def steps(self) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {"strategy": run.strategy, "repeat": n, **step}
                for n, run in self._numbered()
                for step in run.steps
            ]
        )

    def requests(self) -> pd.DataFrame:
        rows = []
        for repeat, run in self._numbered():
            for request in run.requests:
                done = request.state is RequestState.FINISHED
                latency = (
                    metrics.latencies(request)
                    if done
                    else dict.fromkeys(("ttft", "tpot", "e2el", "itl"))
                )
                stamps = {
                    n: getattr(request, n)
                    for n in ("arrived_at", "scheduled_at", "first_token_at", "finished_at")
                }
                rows.append(
                    {
                        "strategy": run.strategy,
                        "repeat": repeat,
                        "request": request.id,
                        "state": str(request.state),
                    }
                    | {
                        "prompt_tokens": len(request.prompt),
                        "output_tokens": len(request.output_tokens),
                    }
                    | {
                        name: None if at is None else at - run.started_at
                        for name, at in stamps.items()
                    }
                    | {
                        f"{name}_ms": None if latency[name] is None else latency[name] * 1000
                        for name in ("ttft", "tpot", "e2el")
                    }
                    | {
                        "itl_ms": None
                        if latency["itl"] is None
                        else [gap * 1000 for gap in latency["itl"]]
                    }
                    | {
                        "num_preemptions": request.num_preemptions,
                        "finish_reason": request.finish_reason,
                        "error": request.error,
                    }
                )
        return pd.DataFrame(rows)

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

    def _numbered(self):
        seen: dict[str, int] = {}
        for run in self.runs:
            seen[run.strategy] = seen.get(run.strategy, -1) + 1
            yield seen[run.strategy], run


def full_pool(items: Sequence[WorkItem], block_size: int, batch_size: int) -> int:
    """Blocks that the ``batch_size`` longest requests fill together at their ends: more than any
    batch can use.
    """
    blocks = sorted((-(-(item.total_tokens - 1) // block_size) for item in items), reverse=True)
    return sum(blocks[:batch_size])


def bench_pool(setting: Setting, items: Sequence[WorkItem], max_seq_len: int) -> int:
    """``setting.num_blocks`` as a number; by default `full_pool`. A percentage never gives less
    than one region of ``static``.
    """
    at_least("block-size", setting.block_size, 1)
    at_least("batch-size", setting.batch_size, 1)
    given = "100%" if setting.num_blocks is None else setting.num_blocks
    blocks = pool_blocks(given, lambda: full_pool(items, setting.block_size, setting.batch_size))
    return (
        max(blocks, -(-max_seq_len // setting.block_size))
        if isinstance(given, str) and given.endswith("%")
        else blocks
    )


def run_bench(
    model: nn.Module,
    items: Sequence[WorkItem],
    strategies: Sequence[str | Callable[[int], Allocator]] = DEFAULT,
    setting: Setting = Setting(),
    *,
    repeats: int = 1,
    stop_token_ids: Sequence[int] = (),
    progress: Callable[[int, str], None] = lambda tokens, strategy: None,
) -> Bench:
    """Run every strategy on ``items``, ``repeats`` times in turn, and check every token against the
    unmodified model.

    ``progress(tokens, strategy)`` is told of tokens as they come. A request that cannot fit is
    refused by name on standard error and counted; `BadInput` when every one is.
    """
    for strategy in strategies:
        if strategy != MLX_LM and not callable(strategy):
            one_of("strategy", strategy, ALL)
    check_names(strategies)
    names = [_name(strategy) for strategy in strategies]
    at_least("repeats", repeats, 1)
    context, vocabulary = model_limits(model)
    max_seq_len = setting.max_seq_len or default_max_seq_len(items, context)
    num_blocks = bench_pool(setting, items, max_seq_len)
    job = _Job(
        model,
        items,
        [],
        num_blocks,
        setting,
        max_seq_len,
        () if setting.ignore_eos else tuple(stop_token_ids),
        progress,
    )
    if (needed := num_blocks * setting.block_size * job.slot_bytes) > memory_bytes():
        raise BadInput(
            f"num-blocks {num_blocks} needs {needed / 2**30:.1f} GiB, this machine has "
            f"{memory_bytes() / 2**30:.1f} GiB"
        )
    job.refuse(strategies)
    job.prompts = prompt_tokens(items, vocabulary, setting.seed)
    bench = Bench(setting)
    one_by_one: list[Run] = []
    for strategy in strategies:
        job.warm_up(strategy)
    for _ in range(repeats):
        for strategy in strategies:
            run = job.run(strategy)
            bench.runs.append(run)
            if strategy == MLX_LM and setting.batch_size == 1:
                one_by_one.append(job.mlx_lm(one_by_one=True))
    if one_by_one and sum(run.duration for run in one_by_one) < sum(
        run.duration for run in bench.runs if run.strategy == MLX_LM
    ):
        singles = iter(one_by_one)  # at batch 1 the faster of mlx-lm's two ways counts
        bench.runs = [next(singles) if run.strategy == MLX_LM else run for run in bench.runs]
    references: dict[tuple, Difference | None] = {}
    for name in names:
        runs = [run for run in bench.runs if run.strategy == name]
        bench.rows.append(_row(runs, setting, job, references))
    bench.ratios = _ratios(bench.runs, names)
    return bench


@dataclass
class _Job:
    """The workload with everything that stays the same from run to run."""

    model: nn.Module
    items: Sequence[WorkItem]
    prompts: list[list[int]]
    num_blocks: int
    setting: Setting
    max_seq_len: int
    stops: Sequence[int]
    progress: Callable[[int, str], None]
    refused: set[int] = field(
        default_factory=set
    )  # requests that one of the strategies cannot serve, by index

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one token's K and V."""
        return Driver(self.model).slot_bytes

    @cached_property
    def shared_tokens(self) -> dict[str, int] | None:
        """By request, how many of its first tokens another one has too; None without prefix
        caching.
        """
        if not self.setting.prefix_caching:
            return None
        seen = Counter(
            item.prefix_ids[:n] for item in self.items for n in range(1, len(item.prefix_ids) + 1)
        )
        return {
            f"r{index}": sum(
                seen[item.prefix_ids[:n]] > 1 for n in range(1, len(item.prefix_ids) + 1)
            )
            * item.prefix_block
            for index, item in enumerate(self.items)
        }

    def refuse(self, strategies) -> None:
        """Leave out, for all, what one strategy cannot serve: only then are they compared on the
        same requests.

        Known before anything runs; `BadInput` when nothing is left.
        """
        refusals: dict[tuple[int, str], list[str]] = {}
        for strategy in strategies:
            with blamed_on(strategy):
                fits = self._fits(strategy)
                reasons = {
                    index: reason for index, item in enumerate(self.items) if (reason := fits(item))
                }
            self.refused.update(reasons)
            for index, reason in reasons.items():
                refusals.setdefault((index, reason), []).append(_name(strategy))
        lines = [
            f"{', '.join(names)}: refused: request 'r{index}' {reason}"
            for (index, reason), names in sorted(refusals.items())
        ]
        if len(self.refused) == len(self.items):
            raise BadInput(f"no request can be served; {lines[0]}")
        for line in lines:
            print(line, file=sys.stderr)

    def _fits(self, strategy) -> Callable[[WorkItem], str | None]:
        blocks = None
        if strategy != MLX_LM:
            blocks = BlockManager(
                strategy_of(strategy),
                self.num_blocks,
                self.setting.block_size,
                self.max_seq_len,
                self.setting.prefix_caching,
            )

        def reason(item: WorkItem) -> str | None:
            if item.total_tokens > self.max_seq_len:
                return (
                    f"wants {item.total_tokens} tokens (prompt + output), but max-seq-len is "
                    f"{self.max_seq_len}"
                )
            if blocks and not blocks.could_ever_hold(item.total_tokens - 1):
                return (
                    f"wants {item.total_tokens - 1} slots, which can never fit the pool of "
                    f"{self.num_blocks * blocks.block_size} slots"
                )
            return None

        return reason

    def run(self, strategy) -> Run:
        if strategy == MLX_LM:
            return self.mlx_lm()
        with blamed_on(strategy):
            return self.engine(strategy)

    def warm_up(self, strategy) -> None:
        """A few short requests, kept out of every figure: kernels compiled, weights paged in."""
        n = min(self.setting.batch_size, 2)
        length = min(WARMUP_PROMPT, self.max_seq_len - WARMUP_TOKENS)
        if length < 1:
            return
        items = [WorkItem(0.0, length, WARMUP_TOKENS)] * n
        blocks = max(
            n * 2 * -(-(length + WARMUP_TOKENS) // self.setting.block_size),
            -(-self.max_seq_len // self.setting.block_size),
        )
        small = _Job(
            self.model,
            items,
            [[0] * length] * n,
            blocks,
            self.setting,
            self.max_seq_len,
            (),
            lambda tokens, strategy: None,
        )
        small.run(strategy)
        if strategy == MLX_LM and self.setting.batch_size == 1:
            small.mlx_lm(one_by_one=True)

    def engine(self, strategy) -> Run:
        """The workload on our engine."""
        records: list[StepRecord] = []
        engine = Engine(
            self.model,
            num_blocks=self.num_blocks,
            block_size=self.setting.block_size,
            strategy=strategy,
            max_batch_size=self.setting.batch_size,
            max_seq_len=self.max_seq_len,
            on_step=records.append,
            prefix_caching=self.setting.prefix_caching,
            **self.setting.engine,
        )
        engine.cache.warmup()
        name = _name(strategy)
        started_at = engine.clock()
        coming = [(i, item) for i, item in enumerate(self.items) if i not in self.refused][::-1]
        requests = []
        while coming or engine.requests:
            while coming and started_at + coming[-1][1].arrived_at <= engine.clock():
                index, item = coming.pop()
                requests.append(
                    engine.submit(
                        self.prompts[index],
                        item.output_tokens,
                        stop_token_ids=self.stops,
                        request_id=f"r{index}",
                        arrived_at=started_at + item.arrived_at,
                    )
                )
            if engine.requests:
                self.progress(sum(event.token is not None for event in engine.step()), name)
            elif coming:
                time.sleep(max(0.0, started_at + coming[-1][1].arrived_at - engine.clock()))
        duration = engine.clock() - started_at
        stats = engine.stats()
        steps = [
            _engine_step(record, started_at, engine.cache.blocks.block_size) for record in records
        ]
        return Run(
            name,
            requests,
            len(self.refused),
            started_at,
            duration,
            steps,
            self.num_blocks,
            self.setting.block_size,
            stats.arena_bytes,
            stats.copied_bytes,
            stats.num_preemptions,
            max(
                sum(held.num_slots - held.num_counted for held in record.held) for record in records
            )
            * engine.cache.arena.slot_bytes,
            stats.prefix_hit_rate,
        )

    def mlx_lm(self, one_by_one: bool = False) -> Run:
        """Run the workload on mlx-lm's `BatchGenerator`, or on `generate_step`."""
        uses: list[CacheUse] = []
        started_at = time.perf_counter()
        requests = [
            Request(
                f"r{i}",
                tuple(prompt),
                item.output_tokens,
                frozenset(self.stops),
                started_at + item.arrived_at,
            )
            for i, (item, prompt) in enumerate(zip(self.items, self.prompts, strict=True))
            if i not in self.refused
        ]
        if one_by_one:
            ended = run_one_by_one(
                self.model, requests, uses.append, shared_tokens=self.shared_tokens
            )
        else:
            ended = run_batch_generator(
                self.model,
                requests,
                self.setting.batch_size,
                uses.append,
                shared_tokens=self.shared_tokens,
            )
        for request in ended:
            self.progress(len(request.output_tokens), MLX_LM)
        duration = time.perf_counter() - started_at
        steps = [_mlx_lm_step(use, started_at, self.slot_bytes) for use in uses]
        mx.clear_cache()
        return Run(
            MLX_LM,
            requests,
            len(self.refused),
            started_at,
            duration,
            steps,
            peak_kv_bytes=max(use.nbytes for use in uses),
        )


def _name(strategy) -> str:
    return strategy if strategy == MLX_LM else strategy_of(strategy).name


def _engine_step(record: StepRecord, start: float, block_size: int) -> dict:
    held = [
        (
            h.num_slots - h.num_counted,
            h.num_tokens - h.num_counted,
            h.table.num_tokens - h.num_counted,
        )
        for h in record.held
    ]
    slots = metrics.step_shares(held, record.unusable_slots)
    extents = [
        [held.request_id, [[e.start, e.num_blocks] for e in held.extents]] for held in record.held
    ]
    return {
        "started_at": record.started_at - start,
        "ended_at": record.ended_at - start,
        "host_s": record.host_s,
        "num_prefill_tokens": record.num_prefill_tokens,
        "num_decode_tokens": record.num_decode_tokens,
        "num_running": record.num_running,
        "num_waiting": record.num_waiting,
        **{f"{name}_slots": count for name, count in slots.items()},
        "pool_slots": (record.pool.used_blocks + record.pool.free_blocks) * block_size,
        **record.pool,
        "copied_bytes": record.copied_bytes,
        "extents": json.dumps(
            extents, separators=(",", ":")
        ),  # [[request, [[first block, blocks], ...]], ...]
    }


def _mlx_lm_step(use: CacheUse, start: float, slot_bytes: int) -> dict:
    held = use.nbytes // slot_bytes
    return {
        "started_at": use.started_at - start,
        "ended_at": use.ended_at - start,
        "num_running": use.num_running,
        "num_waiting": use.num_waiting,
        **{
            "token_slots": use.num_tokens,
            "reserved_slots": 0,
            "internal_slots": held - use.num_tokens,
            "external_slots": 0,
        },
    }


def _row(runs: list[Run], setting: Setting, job: _Job, references: dict) -> dict:
    """One strategy's row: counts of the first run, medians over all, and a 95 % interval for what
    is timed.
    """
    first = runs[0]
    timed = [_timed(run) for run in runs]
    row = {
        "strategy": first.strategy,
        "block_size": first.block_size,
        "num_blocks": first.num_blocks,
        "batch_size": setting.batch_size,
        "completed": sum(request.state is RequestState.FINISHED for request in first.requests),
        "refused": first.refused,
        "total_input_tokens": sum(len(request.prompt) for request in first.requests),
        "total_output_tokens": first.output_tokens,
        **{name: _median([each[name] for each in timed]) for name in TIMED},
        **_median_of_dicts([_shares(run) for run in runs]),
        "copied_bytes": first.copied_bytes,
        "peak_kv_bytes": max(run.peak_kv_bytes for run in runs),
        "arena_bytes": first.arena_bytes,
        "num_preemptions": first.num_preemptions,
        "prefix_hit_rate": first.prefix_hit_rate,
        "cached_tokens": sum(request.cached_tokens for request in first.requests)
        if setting.prefix_caching
        else None,
        **_median_of_dicts([_host_time(run) for run in runs]),
        "tokens_sha256": metrics.tokens_sha256(
            [request.output_tokens for request in first.requests]
        ),
        **_equality(runs, job.model, references),
        "repeats": len(runs),
    }
    for name in TIMED:
        interval = metrics.median_interval([each[name] for each in timed if each[name] is not None])
        row[f"{name}_low"], row[f"{name}_high"] = interval or (None, None)
    return row


def _timed(run: Run) -> dict:
    finished = [request for request in run.requests if request.state is RequestState.FINISHED]
    return {
        "duration": run.duration,
        "request_throughput": len(finished) / run.duration,
        "output_throughput": run.output_tokens / run.duration,
        **metrics.latency_summary(finished),
    }


def _shares(run: Run) -> dict:
    steps = [(s["ended_at"] - s["started_at"], s) for s in run.steps]
    result = metrics.shares(
        (seconds, {name: s[f"{name}_slots"] for name in metrics.SHARES}) for seconds, s in steps
    )
    for name in ("external_fragmentation", "num_holes"):
        result[name] = metrics.weighted_mean(
            (seconds, s[name]) for seconds, s in steps if name in s
        )
    return result


def _host_time(run: Run) -> dict:
    """What scheduling, block tables and plans take of a step in which all decode: the median, and
    their share of all such steps.
    """
    steps = [step for step in run.steps if "host_s" in step and not step["num_prefill_tokens"]]
    spent = sum(step["ended_at"] - step["started_at"] for step in steps)
    return {
        "median_host_us": median(step["host_s"] * 1e6 for step in steps) if steps else None,
        "host_share": sum(step["host_s"] for step in steps) / spent if spent else None,
    }


def _equality(runs: list[Run], model: nn.Module, references: dict) -> dict:
    """How the outputs compare to the unmodified model's greedy choice; the worst of the repeats
    counts.
    """
    counts = []
    for run in runs:
        identical, near_tie, gaps = 0, 0, [0.0]
        for request in run.requests:
            whole = (
                request.finish_reason == "stop" or len(request.output_tokens) == request.max_tokens
            )
            if request.state is not RequestState.FINISHED or not whole:
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


def _ratios(runs: list[Run], names: list[str]) -> list[dict]:
    if MLX_LM not in names:
        return []
    throughput = {
        name: [run.output_tokens / run.duration for run in runs if run.strategy == name]
        for name in names
    }
    return [
        {
            "strategy": name,
            "baseline": MLX_LM,
            "output_throughput": metrics.ratio_summary(throughput[name], throughput[MLX_LM]),
        }
        for name in names
        if name != MLX_LM
    ]


def _median(values: list) -> float | None:
    values = [value for value in values if value is not None]
    return median(values) if values else None


def _median_of_dicts(dicts: list[dict]) -> dict:
    return {name: _median([each[name] for each in dicts]) for name in dicts[0]}


def recommendation(bench: Bench) -> str:
    """One sentence computed from the runs: which strategy, by how much, and whether that is more
    than noise.

    Compared run by run: a lead is one only when it holds in every repeat, and one repeat shows
    none.
    """
    ours = [row for row in bench.rows if row["strategy"] != MLX_LM]
    if not ours:
        return "Only mlx-lm was run: name a strategy to compare."
    throughput = {
        row["strategy"]: [
            run.output_tokens / run.duration
            for run in bench.runs
            if run.strategy == row["strategy"]
        ]
        for row in bench.rows
    }
    by_speed = sorted(ours, key=lambda row: row["output_throughput"], reverse=True)
    fastest = by_speed[0]["strategy"]
    if len(throughput[fastest]) == 1:
        leanest = max(ours, key=lambda row: row["token_share"])
        return (
            f"Fastest in this one run: {fastest}, {by_speed[0]['output_throughput']:.1f} output "
            f"tokens/s; leanest: {leanest['strategy']}, "
            f"{leanest['token_share']:.0%} of the KV memory it ties up is tokens. One run cannot "
            "tell speed from noise: add --repeats 3."
        )
    tied = [row for row in by_speed if not _ahead(throughput[fastest], throughput[row["strategy"]])]
    best = max(tied, key=lambda row: row["token_share"])
    name = best["strategy"]
    text = (
        f"Use {name}: {best['output_throughput']:.1f} output tokens/s, {best['token_share']:.0%} "
        "of the KV memory it ties up is tokens"
    )
    if rivals := [row for row in tied if row is not best]:
        text += "; no difference in speed beyond noise: " + ", ".join(
            f"{_lead(throughput[name], throughput[row['strategy']])} {row['strategy']}"
            for row in rivals
        )
        text += ", so memory decides: " + ", ".join(
            f"{row['strategy']} has {row['token_share']:.0%}" for row in rivals
        )
    if slower := [row for row in by_speed if row not in tied]:
        text += (
            f"; {_lead(throughput[name], throughput[slower[0]['strategy']])} "
            f"{slower[0]['strategy']}, the next"
        )
    if MLX_LM in throughput:
        ours, theirs = throughput[name], throughput[MLX_LM]
        noise = ", within noise" if not (_ahead(ours, theirs) or _ahead(theirs, ours)) else ""
        text += f"; {_lead(ours, theirs)} mlx-lm's own batching{noise}"
    return text + "."


def _lead(ours: list[float], theirs: list[float]) -> str:
    """How much faster, in words: the median of the ratios run by run, which need not be the ratio
    of the medians.
    """
    ratio = metrics.ratio_summary(ours, theirs)
    return (
        f"{ratio['median'] - 1:+.0%} run by run ({ratio['min'] - 1:+.0%} to "
        f"{ratio['max'] - 1:+.0%}, {ratio['n']} repeats) against"
    )


def _ahead(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) > 1 and all(a > b for a, b in zip(ours, theirs, strict=True))
