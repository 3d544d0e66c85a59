"""Calls of the library for `fuzz`: the valid arguments of each, of which one is changed."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from random import Random

import mlx.core as mx
from fuzz_commands import STEP_TIME, write_sources
from fuzz_values import Input, call

import cortexlab as cl
from cortexlab.allocators import STRATEGIES
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.engine.model_runner import ModelRunner
from cortexlab.host.models import load_model
from cortexlab.options import EngineOptions, ReplayOptions, RequestOptions
from cortexlab.replay import Replay, StepTime, replay
from cortexlab.workloads.synthetic import (
    LENGTHS,
    WorkItem,
    conversations,
    make_workload,
    shuffled_lengths,
    with_arrivals,
)
from cortexlab.workloads.traces import load_trace


@cache
def tiny() -> ModelRunner:
    return ModelRunner(load_model("tiny")[0])


def defaults(kind: type, *without: str) -> dict:
    return {each.name: each.default for each in fields(kind) if each.name not in without}


ENGINE = defaults(EngineOptions) | {"num_blocks": 16, "block_size": 4, "max_batch_size": 2}
REQUEST = defaults(RequestOptions) | {"prompt": [1, 2, 3], "max_tokens": 2, "request_id": "a"}
REPLAY = defaults(ReplayOptions, "num_blocks", "block_size", "strategy") | {"max_batch_size": 4}
CACHE = {
    **{"num_layers": 1, "num_kv_heads": 2, "head_dim": 4, "max_total_tokens": 32, "block_size": 4},
    **{"strategy": "paged", "growth": None, "max_seq_len": 16, "dtype": mx.float32},
}
WORKLOAD = {"name": "chat", "num_requests": 3, "seed": 0, "context": 512} | {
    "request_rate": math.inf, "burstiness": 1.0, "scale_lengths": 1.0
}  # fmt: skip
ITEM = {"arrived_at": 0.0, "prompt_tokens": 20, "output_tokens": 3} | {
    "prefix_ids": (0,), "prefix_block": 16, "max_tokens": None
}  # fmt: skip
ITEMS = [WorkItem(**ITEM), WorkItem(1.0, 30, 5)]


def engine(**options) -> None:
    """Make an engine and let it serve a request."""
    made = cl.Engine(tiny(), **options)
    made.submit([1, 2, 3], 2)
    list(made.run())
    made.stats()


def submit(**options) -> None:
    """Serve a request beside another one."""
    made = cl.Engine(tiny(), num_blocks=32, block_size=4, max_batch_size=2, clock=lambda: 0.0)
    good = made.submit([4, 5], 3)
    made.submit(**options)
    list(made.run())
    assert len(good.output_tokens) == 3, "another request suffered"
    assert made.stats().used_blocks == 0


def cache_of(**options) -> None:
    made = cl.KVCache(**options)
    made.allocate_for("a", 1)
    made.stats()


def in_cache(method: str, **given) -> None:
    """Call a method of a cache that holds the sequence a."""
    made = cl.KVCache(**CACHE)
    made.allocate_for("a", 3)
    try:
        getattr(made, method)(**given)
    finally:
        made.blocks.check()


def in_pool(strategy: str, method: str, **given) -> None:
    """Call a method of an allocator that has handed out three blocks."""
    pool = cl.make_allocator(strategy, 32)
    held = pool.allocate(3)
    if given.get("extents") is HELD:
        given["extents"] = held
    try:
        getattr(pool, method)(**given)
    finally:
        pool.check()


def run_replay(strategy: object, items: object, step_time: object, on_sample: object, **options):
    Replay(strategy, step_time=step_time, on_sample=on_sample, **options).run(items)


def bench(**given) -> None:
    """Benches on the tiny model, with a `Setting` of its own."""
    names = {each.name for each in fields(Setting)}
    setting = Setting(**{name: given.pop(name) for name in names & set(given)})
    run_bench(tiny().model, setting=setting, **given)


KV = {"keys": mx.zeros((2, 1, 4)), "values": mx.zeros((2, 1, 4))}
METHODS = {
    "allocate_for": {"sequence": "b", "num_tokens": 3, "max_tokens": 8},
    "append_token": {"sequence": "a"},
    "write": {"sequence": "a", "layer": 0, "start": 0} | KV,
    "get_k_view": {"sequence": "a", "layer": 0},
    "get_v_views": {"sequence": "a", "layer": 0},
    "used_tokens": {"sequence": "a"},
    "get_token_offset_in_block": {"sequence": "a"},
    "free_for": {"sequence": "a"},
    "extents": {"sequence": "a"},
}
HELD = "the extents in hand"
IN_POOL = {
    "allocate": {"num_blocks": 2},
    "extend": {"extents": HELD, "num_blocks": 1},
    "free": {"extents": HELD},
}
REPLAYS = {"items": ITEMS, "strategies": ["paged", "runs"], "block_sizes": [4, 16]} | {
    "num_blocks": 64, "progress": lambda done: None, "step_time": StepTime(0.01, 0.0, 0.0)
}  # fmt: skip
CALLS: list[tuple[Callable, dict]] = [
    *[(engine, ENGINE)] * 4,
    *[(submit, REQUEST)] * 5,
    *[(cache_of, CACHE)] * 3,
    *[(replay, REPLAYS | REPLAY)] * 5,
    (run_replay, REPLAY | {"items": ITEMS, "strategy": "paged", "step_time": StepTime(1, 0, 0)}
     | {"on_sample": None, "num_blocks": 64}),
    *[(cl.SamplingParams, defaults(cl.SamplingParams))] * 2,
    *[(make_workload, WORKLOAD)] * 2,
    (cl.make_allocator, {"placement": "static", "num_blocks": 32, "region_blocks": 4}),
    (cl.KVBlockAllocator, {"total_blocks": 32, "strategy": "first_fit"}),
    (StepTime, STEP_TIME),
    (StepTime.fit, {"steps": [(0.1, 3, 1), (0.2, 6, 2), (0.3, 9, 2)]}),
    (StepTime.load, {"path": "none.json"}),
    (WorkItem, ITEM),
    (conversations, {"num_conversations": 2, "num_turns": 2, "system_tokens": 32}
     | {"request_rate": 1.0, "pause": 3.0, "unit": 16, "seed": 0}),
    (shuffled_lengths, {"items": ITEMS, "seed": 0}),
    (with_arrivals, {"items": ITEMS, "request_rate": 1.0, "burstiness": 1.0, "seed": 0}),
    (load_trace, {"name": "azure.csv", "seed": 0, "num_requests": 2, "trace_block": 16}),
    (load_model, {"name": "tiny", "seed": 0}),
    (bench, defaults(Setting, "engine") | {"items": ITEMS, "strategies": ["paged"], "engine": {}}
     | {"num_blocks": "100%", "stop_token_ids": (), "progress": lambda tokens, strategy: None}),
]  # fmt: skip


def a_call(rng: Random, kept: Path) -> Input:
    write_sources()
    return call(rng, *rng.choice(CALLS), free=rng.random() < 0.15)


def a_method(rng: Random, kept: Path) -> Input:
    if rng.random() < 0.6:
        method = rng.choice([*METHODS])
        return call(rng, partial(in_cache, method), METHODS[method])
    method, strategy = rng.choice([*IN_POOL]), rng.choice([*STRATEGIES])
    return call(rng, partial(in_pool, strategy, method), IN_POOL[method])


def a_workload(rng: Random, kept: Path) -> Input:
    """A workload with valid arguments at the ends of their ranges."""
    given = WORKLOAD | {"name": rng.choice([*LENGTHS]), "num_requests": rng.choice((1, 2, 50))}
    given |= {"context": rng.choice((None, 1, 2, 2**31 - 1)), "seed": rng.choice((0, 2**31 - 1))}
    given |= {"request_rate": rng.choice((1e-6, 1e300, math.inf))}
    given |= {"burstiness": rng.choice((1e-300, 1e-9, 1e300))}
    return call(rng, make_workload, given)
