"""The main job: one workload, one real model, every strategy and mlx-lm's own batching, in
alternating repeats.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .. import answer
from ..allocators import STRATEGIES, Allocator, blamed_on, check_names, strategy_of
from ..engine.arena import slot_bytes
from ..engine.engine import Engine
from ..engine.model_runner import ModelRunner
from ..engine.records import StepRecord
from ..engine.submission import misfit
from ..errors import (
    BadInput,
    ModelError,
    a_function,
    a_number,
    a_sequence,
    at_least,
    one_of,
    shown,
    token_ids,
    yes_or_no,
)
from ..options import (
    BENCH_BATCH_SIZE,
    BENCHED,
    DEFAULT_STEP_TOKENS,
    MLX_LM,
    Checked,
    EngineOptions,
    at_least_one,
    option,
)
from ..scheduler.block_manager import BlockManager
from ..scheduler.layer_groups import LayerGroup, block_manager
from ..scheduler.request import Request
from ..workloads.synthetic import (
    WorkItem,
    checked_items,
    default_max_seq_len,
    pool_blocks,
    prompt_tokens,
)
from .environment import memory_bytes
from .mlx_lm import CacheUse, Difference, run_batch_generator, run_one_by_one
from .summary import Bench, Run, engine_step, mlx_lm_step, ratios, strategy_row

ALL = (*STRATEGIES, MLX_LM)
WARMUP_PROMPT, WARMUP_TOKENS = 32, 4  # tokens of each warm-up request

Strategy = str | Callable[[int], Allocator]
Progress = Callable[[int, str], None]


OWN = "num_blocks", "block_size", "max_batch_size", "max_seq_len", "prefix_caching"  # a setting's


def _pool_given(name: str, value: object) -> int | str:
    """``value``, or `BadInput` when it is neither a number of blocks nor a percentage."""
    pool_blocks(value, lambda: 1)
    return value


@dataclass(frozen=True)
class Setting(Checked):
    """What every strategy of one bench shares. ``num_blocks``: a number, or a percentage of
    `full_pool`; ``engine``: more of `EngineOptions`.
    """

    block_size: int = option(EngineOptions.block_size, check=at_least_one)
    num_blocks: int | str | None = option(None, check=_pool_given)
    batch_size: int = option(BENCH_BATCH_SIZE, check=at_least_one)
    max_seq_len: int | None = option(EngineOptions.max_seq_len, check=at_least_one)
    ignore_eos: bool = option(True, check=yes_or_no)
    seed: int = option(0, check=partial(at_least, minimum=0))
    # for mlx-lm: its own `LRUPromptCache`
    prefix_caching: bool = option(EngineOptions.prefix_caching, check=yes_or_no)
    engine: Mapping = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.engine, Mapping):
            raise BadInput(f"engine must be a dict of options, not {shown(self.engine)}")
        known = {each.name for each in fields(EngineOptions)} - {*OWN, "strategy"}
        for name in self.engine:
            one_of("engine option", name, known)
        EngineOptions(num_blocks=1, max_batch_size=self.batch_size, **self.engine)


def full_pool(
    items: Sequence[WorkItem],
    block_size: int,
    batch_size: int,
    most_blocks: Callable[[int], int] | None = None,
) -> int:
    """Blocks that the ``batch_size`` longest requests hold together at their ends: more than any
    batch can use. ``most_blocks``: of so many tokens, where a model's layers form groups.
    """
    most_blocks = most_blocks or (lambda num_tokens: -(-num_tokens // block_size))
    blocks = sorted((most_blocks(item.total_tokens - 1) for item in items), reverse=True)
    return sum(blocks[:batch_size])


def bench_pool(
    setting: Setting,
    items: Sequence[WorkItem],
    max_seq_len: int,
    most_blocks: Callable[[int], int] | None = None,
) -> int:
    """``setting.num_blocks`` as a number; by default `full_pool`. A percentage never gives less
    than one region of ``static``.
    """
    given = "100%" if setting.num_blocks is None else setting.num_blocks
    sizes = setting.block_size, setting.batch_size
    blocks = pool_blocks(given, lambda: full_pool(items, *sizes, most_blocks))
    if isinstance(given, str) and given.endswith("%"):
        longest = [WorkItem(0.0, max_seq_len, 1)]  # its last token takes no slot
        return max(blocks, full_pool(longest, setting.block_size, 1, most_blocks))
    return blocks


def _block_manager(
    runner: ModelRunner,
    setting: Setting,
    num_blocks: int,
    max_seq_len: int,
    strategy: str | Callable[[int], Allocator] = "paged",
) -> BlockManager:
    """A block manager like that of an engine for ``setting``."""
    options = EngineOptions(
        num_blocks=num_blocks, max_batch_size=setting.batch_size, **setting.engine
    )
    found = strategy_of(strategy, options.growth)
    return block_manager(
        runner.groups(found, setting.prefix_caching),
        options.step_tokens(DEFAULT_STEP_TOKENS), found, num_blocks, setting.block_size,
        max_seq_len, setting.prefix_caching,
    )  # fmt: skip


def run_bench(
    model: nn.Module,
    items: Sequence[WorkItem],
    strategies: Sequence[Strategy] = BENCHED,
    setting: Setting = Setting(),
    *,
    repeats: int | str = 1,
    seconds: float = answer.SECONDS,
    stop_token_ids: Sequence[int] = (),
    progress: Progress | None = None,
) -> Bench:
    """Run every strategy on ``items``, ``repeats`` times in turn, and check every token against the
    unmodified model. With ``repeats="auto"`` until every two strategies are told apart or equal, as
    far as `answer.LOOKS` and ``seconds`` allow.

    ``progress(tokens, strategy)`` is called with tokens as they come. A request that cannot fit is
    refused by name on standard error and counted; `BadInput` when every one is.
    """
    items, strategies = checked_items(items), a_sequence("strategies", strategies, least=1)
    for strategy in strategies:
        if not callable(strategy):
            one_of("strategy", strategy, ALL)
    if not isinstance(setting, Setting):
        raise BadInput(f"setting must be a Setting, not {shown(setting)}")
    progress = a_function("progress", progress) or (lambda tokens, strategy: None)
    names = check_names(strategies)
    if not isinstance(repeats, str) or repeats != answer.AUTO:
        repeats = at_least("repeats", repeats, 1)
    seconds = a_number("seconds", seconds, low=0)
    named = dict(zip(names, strategies, strict=True))
    runner = ModelRunner(model)
    stop_token_ids = token_ids(
        "stop_token_ids", stop_token_ids, runner.vocabulary, in_any_order=True
    )
    job = _job(runner, items, named, setting, stop_token_ids, progress)
    for strategy in strategies:
        job.warm_up(strategy)
    bench = Bench()
    turns = _until_known(bench, seconds) if repeats == answer.AUTO else range(repeats)
    _take_turns(bench, job, strategies, turns)
    references: dict[tuple, Difference | None] = {}
    num_refused = len(items) - len(job.items)
    shared = num_refused, setting.batch_size, setting.prefix_caching, model, references
    bench.rows = [strategy_row(bench.of(name), *shared) for name in names]
    bench.ratios = ratios(bench, names)
    return bench


def _take_turns(
    bench: Bench, job: "_Job", strategies: Sequence[Strategy], turns: Iterable[int]
) -> None:
    """Run every strategy in each of the ``turns``. Each in turn goes first, so that a place in the
    turn is nobody's advantage.
    """
    one_by_one = []
    for turn in turns:
        first = turn % len(strategies)
        for strategy in (*strategies[first:], *strategies[:first]):
            bench.runs.append(job.run(strategy))
            if strategy == MLX_LM and job.setting.batch_size == 1:
                one_by_one.append(job.mlx_lm(one_by_one=True))
    if one_by_one and _seconds(one_by_one) < _seconds(bench.of(MLX_LM)):
        singles = iter(one_by_one)  # at batch 1 the faster of mlx-lm's two ways counts
        bench.runs = [next(singles) if run.strategy == MLX_LM else run for run in bench.runs]


def _until_known(bench: Bench, seconds: float) -> Iterator[int]:
    """Numbers of repeats until ``bench`` knows its answer, ``seconds`` are over, or looks are. Each
    look is booked in the bench, with the chance of an error that it takes.
    """
    started_at, before = time.perf_counter(), 0
    for repeat in range(answer.LOOKS[-1]):
        yield repeat
        done = repeat + 1
        last = done == answer.LOOKS[-1] or time.perf_counter() - started_at >= seconds
        if done in answer.LOOKS or last:
            bench.error = answer.error_of_look(done, before, last)
            bench.looks.append({"repeats": done, "error": bench.error})
            if last or bench.comparison.known:
                return
            before = done


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The workload with everything that stays the same from run to run."""

    runner: ModelRunner
    items: Mapping[int, WorkItem]  # by number, without refused ones
    prompts: Sequence[list[int]]  # by number, refused ones included
    shared_tokens: Mapping[str, int]  # `_shared_tokens` for mlx-lm's prompt cache
    num_blocks: int
    max_seq_len: int
    setting: Setting
    stops: Sequence[int]
    progress: Progress

    def warm_up(self, strategy: Strategy) -> None:
        """A few short requests, kept out of every figure: kernels compiled, weights paged in."""
        n = min(self.setting.batch_size, 2)
        length = min(WARMUP_PROMPT, self.max_seq_len - WARMUP_TOKENS)
        if length < 1:
            return
        most_blocks = _block_manager(self.runner, self.setting, 1, self.max_seq_len).most_blocks
        pair, region = 2 * most_blocks(length + WARMUP_TOKENS), most_blocks(self.max_seq_len)
        small = replace(
            self,
            items=dict(enumerate([WorkItem(0.0, length, WARMUP_TOKENS)] * n)),
            prompts=[[0] * length] * n,
            shared_tokens={},
            num_blocks=max(n * pair, region),
            stops=(),
            progress=lambda tokens, strategy: None,
        )
        small.run(strategy)
        if strategy == MLX_LM and self.setting.batch_size == 1:
            small.mlx_lm(one_by_one=True)

    def run(self, strategy: Strategy) -> Run:
        """One strategy on the workload, once."""
        if strategy == MLX_LM:
            return self.mlx_lm()
        with blamed_on(strategy):
            return self.engine(strategy)

    def engine(self, strategy: Strategy) -> Run:
        """The workload on our engine."""
        records: list[StepRecord] = []
        engine = Engine(
            self.runner,
            num_blocks=self.num_blocks,
            block_size=self.setting.block_size,
            strategy=strategy,
            max_batch_size=self.setting.batch_size,
            max_seq_len=self.max_seq_len,
            on_step=records.append,
            prefix_caching=self.setting.prefix_caching,
            **self.setting.engine,
        )
        name, started_at = strategy_of(strategy).name, engine.clock()
        requests = list(self._arriving(engine, started_at, name))
        duration, stats = engine.clock() - started_at, engine.stats()
        fills = {request.id: request.fills for request in requests}
        size = self.setting.block_size
        steps = [engine_step(record, started_at, size, fills) for record in records]
        held = "token_slots", "reserved_slots", "internal_slots"
        most = max(sum(step[column] for column in held) for step in steps)
        return Run(
            strategy=name,
            requests=requests,
            started_at=started_at,
            duration=duration,
            steps=steps,
            num_blocks=self.num_blocks,
            block_size=size,
            arena_bytes=stats.arena_bytes,
            copied_bytes=stats.copied_bytes,
            num_preemptions=stats.num_preemptions,
            peak_kv_bytes=round(most * engine.cache.arena.slot_bytes),
            prefix_hit_rate=stats.prefix_hit_rate,
        )

    def _arriving(self, engine: Engine, started_at: float, name: str) -> Iterator[Request]:
        """Submit each request at its arrival and run the engine until all have ended."""
        coming = list(self.items.items())[::-1]
        while coming or engine.requests:
            while coming and started_at + coming[-1][1].arrived_at <= engine.clock():
                number, item = coming.pop()
                yield engine.submit(
                    self.prompts[number],
                    item.output_tokens,
                    stop_token_ids=self.stops,
                    request_id=f"r{number}",
                    arrived_at=started_at + item.arrived_at,
                )
            if engine.requests:
                self.progress(sum(event.token is not None for event in engine.step()), name)
            elif coming:
                time.sleep(max(0.0, started_at + coming[-1][1].arrived_at - engine.clock()))

    def mlx_lm(self, one_by_one: bool = False) -> Run:
        """The workload on mlx-lm's `BatchGenerator`, or on `generate_step`."""
        uses: list[CacheUse] = []
        started_at = time.perf_counter()
        requests = [
            Request(
                f"r{number}",
                tuple(self.prompts[number]),
                item.output_tokens,
                frozenset(self.stops),
                started_at + item.arrived_at,
            )
            for number, item in self.items.items()
        ]
        model, shared = self.runner.model, self.shared_tokens
        if one_by_one:
            ended = run_one_by_one(model, requests, uses.append, shared)
        else:
            size = self.setting.batch_size
            ended = run_batch_generator(model, requests, size, uses.append, shared)
        for request in ended:
            self.progress(len(request.output_tokens), MLX_LM)
        duration = time.perf_counter() - started_at
        mx.clear_cache()
        return Run(
            strategy=MLX_LM,
            requests=requests,
            started_at=started_at,
            duration=duration,
            steps=[mlx_lm_step(use, started_at, self.runner.token_bytes) for use in uses],
            peak_kv_bytes=max(use.nbytes for use in uses),
        )


def _job(
    runner: ModelRunner,
    items: Sequence[WorkItem],
    strategies: Mapping[str, Strategy],
    setting: Setting,
    stop_token_ids: Sequence[int],
    progress: Progress,
) -> _Job:
    """The job of a bench, ``strategies`` being by name; `BadInput` for a pool larger than memory,
    or where nothing fits; `ModelError` for a model without K and V.
    """
    max_seq_len = setting.max_seq_len or default_max_seq_len(items, runner.context)
    groups = _groups_of_all(runner, setting, strategies)
    ours = next((each for each in strategies.values() if each != MLX_LM), "paged")
    most_blocks = _block_manager(runner, setting, 1, max_seq_len, ours).most_blocks
    num_blocks = bench_pool(setting, items, max_seq_len, most_blocks)
    if not runner.token_bytes:
        raise ModelError("a bench compares memory for K and V, and this model has neither")
    layers = runner.block_layers(groups)
    needed = num_blocks * setting.block_size * slot_bytes(layers, runner.dtype)
    if needed > memory_bytes():
        raise BadInput(
            f"num_blocks {num_blocks} needs {needed / 2**30:.1f} GiB, this machine has "
            f"{memory_bytes() / 2**30:.1f} GiB"
        )
    blocks_of = partial(_block_manager, runner, setting, num_blocks, max_seq_len)
    refused = _refused(items, max_seq_len, blocks_of, strategies)
    kept = {number: item for number, item in enumerate(items) if number not in refused}
    return _Job(
        runner=runner,
        items=kept,
        prompts=prompt_tokens(items, runner.vocabulary, setting.seed),
        shared_tokens=_shared_tokens(kept) if setting.prefix_caching else {},
        num_blocks=num_blocks,
        max_seq_len=max_seq_len,
        setting=setting,
        stops=() if setting.ignore_eos else tuple(stop_token_ids),
        progress=progress,
    )


def _groups_of_all(
    runner: ModelRunner, setting: Setting, strategies: Mapping[str, Strategy]
) -> Sequence[LayerGroup]:
    """Groups of layers under every strategy; `BadInput` where they differ."""
    options = EngineOptions(num_blocks=1, max_batch_size=setting.batch_size, **setting.engine)
    of_name = {
        name: runner.groups(strategy_of(each, options.growth), setting.prefix_caching)
        for name, each in strategies.items()
        if each != MLX_LM
    }
    if len({*of_name.values()}) > 1:
        some = [name for name, groups in of_name.items() if len(groups) > 1]
        raise BadInput(
            "prefix_caching: only " + ", ".join(some) + " give back what this model's windows have "
            "passed, so a block holds other layers under each strategy: bench them apart"
        )
    return next(iter(of_name.values()), runner.groups())


def _shared_tokens(items: Mapping[int, WorkItem]) -> dict[str, int]:
    """By request, how many of its first tokens another request has too."""
    prefixes = {
        number: [item.prefix_ids[: n + 1] for n in range(len(item.prefix_ids))]
        for number, item in items.items()
    }
    seen = Counter(prefix for each in prefixes.values() for prefix in each)
    return {
        f"r{number}": sum(seen[prefix] > 1 for prefix in prefixes[number]) * item.prefix_block
        for number, item in items.items()
    }


def _refused(
    items: Sequence[WorkItem],
    max_seq_len: int,
    blocks_of: Callable[[Strategy], BlockManager],
    strategies: Mapping[str, Strategy],
) -> set[int]:
    """Numbers of the requests that one of the strategies cannot serve, known before anything runs.
    They are left out for all: only then are strategies compared on equal requests. `BadInput` when
    nothing is left.
    """
    refusals: dict[tuple[int, str], list[str]] = {}
    for name, strategy in strategies.items():
        with blamed_on(strategy):
            blocks = blocks_of(strategy) if strategy != MLX_LM else None
            for number, reason in _refusals(items, max_seq_len, blocks):
                refusals.setdefault((number, reason), []).append(name)
    lines = [
        f"{', '.join(names)}: refused: request 'r{number}' {reason}"
        for (number, reason), names in sorted(refusals.items())
    ]
    refused = {number for number, _ in refusals}
    if len(refused) == len(items):
        raise BadInput(f"no request can be served; {lines[0]}")
    for line in lines:
        print(line, file=sys.stderr)
    return refused


def _refusals(
    items: Sequence[WorkItem], max_seq_len: int, blocks: BlockManager | None
) -> Iterator[tuple[int, str]]:
    """``(number, reason)`` of each request that one strategy cannot serve."""
    for number, item in enumerate(items):
        if reason := misfit(item.total_tokens, max_seq_len, blocks):
            yield number, reason


def _seconds(runs: Sequence[Run]) -> float:
    return sum(run.duration for run in runs)
