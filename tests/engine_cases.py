"""Any load under any setting of the engine, and the invariants of a run. Used by `test_matrix.py`,
`soak_engine.py` and tests of single parts.

A load is a list of `Arrival`s. Their prompts share beginnings of many lengths, so that the prefix
cache finds a prompt whole, in part or not at all.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

import cortexlab as cl
from cortexlab.allocators import GROWTHS, STRATEGIES, FirstFit
from cortexlab.allocators.runs import Runs
from cortexlab.options import ATTENTION_METHODS, PREEMPTIONS
from cortexlab.scheduler.request import Request, RequestState

# Strategies given as factories: `Runs` that compacts as often as possible, and first fit.
FACTORIES = {"compacting": partial(Runs, copy_share=1.0, gap_blocks=1), "factory": FirstFit}
NOT_SHARING = ("static", "cortexstream_buddy")  # strategies that hand out several blocks at once
POWERS_OF_TWO = ("buddy", "cortexstream_buddy")
TEMPERATURE = 0.8
TURN = 9  # new tokens of a conversation's next prompt, behind the last prompt and its answer

# Settings of the matrix. `soak_engine.py` plays every combination of PRODUCT and draws from DRAWN;
# `test_matrix.py` draws from both.
PRODUCT = {
    "strategy": [*STRATEGIES, *FACTORIES],
    "prefix_caching": [False, True],
    "preemption": list(PREEMPTIONS),
    "oom_policy": ["wait", "preempt"],
    "pipeline": [False, True],
    "attention": list(ATTENTION_METHODS),
}
DRAWN = {
    "growth": [None, None, *GROWTHS],
    "block_size": [16, 1, 3, 64],
    "max_batch_size": [5, 1, 2, 16, 32],
    "max_step_tokens": [512, 16, 33, 100],
    "swap_share": [1.0, 0.5, 0.1],  # swap blocks as a share of the pool's
    "watermark": [0.0, 0.02, 0.2],
    "room": [1.0, 1.2, 2.0, 5.0],  # size of the pool in longest requests
}
ARRIVAL = {
    "common": [0, 24, 3, 40, 41, 64, 130, 400],  # leading tokens from the text of all prompts
    "own": [0, 1, 2],  # number of the text that follows the common one
    "more": [17, 0, 1, 2, 15, 16, 33, 60, 200],  # tokens from the text `own`
    "max_tokens": [9, 1, 2, 24, 40],
    "wait": [0, 0, 0, 1, 4],  # steps since the arrival before
    "cancel": [None, None, None, None, None, 0, 1, 3, 8],  # steps from submit to cancel
    "priority": [0, 0, 0, 1, -1],
    "seed": [None, None, 7],  # seed of sampling; None: greedy
    "turns": [1, 1, 2],  # prompts of the conversation
}


@dataclass(frozen=True)
class Arrival:
    common: int
    own: int
    more: int
    max_tokens: int
    wait: int = 0
    cancel: int | None = None
    priority: int = 0
    seed: int | None = None
    turns: int = 1

    def prompt(self, vocabulary: int) -> list[int]:
        base, tail = (
            np.random.default_rng(seed).integers(vocabulary, size=n).tolist()
            for seed, n in ((0, self.common), (1 + self.own, 2000))
        )
        return (base + tail[: self.more]) or tail[:1]

    @property
    def longest(self) -> int:
        """Tokens of the last turn's prompt and answer."""
        return (
            max(1, self.common + self.more)
            + self.max_tokens
            + (self.turns - 1) * (TURN + self.max_tokens)
        )


def drawn(choices: dict[str, list], rng: random.Random) -> dict:
    """One random value for each name."""
    return {name: rng.choice(values) for name, values in choices.items()}


def random_load(rng: random.Random, largest: int = 8) -> list[Arrival]:
    load = [Arrival(**drawn(ARRIVAL, rng)) for _ in range(rng.randint(1, largest))]
    if rng.random() < 0.1:
        load.append(Arrival(rng.choice([400, 1000]), 0, 1000, 9))
    return load


def engine_options(case: dict, load: list[Arrival]) -> dict:
    """Arguments of `Engine` for one case of the matrix, in a pool of ``room`` times the longest
    request.
    """
    given = dict(case)
    strategy, room, swap_share = given["strategy"], given.pop("room"), given.pop("swap_share")
    longest = max(arrival.longest for arrival in load)
    blocks = -(-longest // given["block_size"])
    if strategy in POWERS_OF_TWO:
        blocks = 1 << (blocks - 1).bit_length()
    given["num_blocks"] = int(blocks * room)
    given["max_seq_len"] = longest
    given["max_step_tokens"] = max(given["max_step_tokens"], given["max_batch_size"])
    given["prefix_caching"] &= strategy not in NOT_SHARING
    given["strategy"] = FACTORIES.get(strategy, strategy)
    if given["preemption"] == "swap":
        given["swap_blocks"] = max(1, int(swap_share * given["num_blocks"]))
    return given


# --- invariants -----------------------------------------------------------------------------------

ENDS = (RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED)
FOLLOWS = {
    RequestState.PENDING: {RequestState.PREFILLING, RequestState.FAILED, RequestState.CANCELLED},
    RequestState.PREFILLING: {
        RequestState.DECODING,
        RequestState.PREEMPTED,
        RequestState.FAILED,
        RequestState.CANCELLED,
    },
    RequestState.DECODING: {RequestState.PREEMPTED, *ENDS},
    # PREEMPTED -> FINISHED: a pipelined step can bring a preempted request's last token.
    RequestState.PREEMPTED: {RequestState.PREFILLING, *ENDS},
}
REASONS = {
    RequestState.FINISHED: ("stop", "length"),
    RequestState.FAILED: ("error",),
    RequestState.CANCELLED: ("cancelled",),
}


def ended_once(request: Request, events: list) -> None:
    """Assert allowed changes of state with one end, one event for each token in order, and one
    finish reason, on the last event.
    """
    states = [RequestState.PENDING, *(state for state, _ in request.history)]
    assert all(after in FOLLOWS[before] for before, after in pairwise(states)), (
        f"{request.id}: {states}"
    )
    assert states[-1] is request.state and request.state in ENDS
    own = [event for event in events if event.request_id == request.id]
    assert [event.token for event in own if event.token is not None] == request.output_tokens, (
        f"{request.id}: events have lost or repeated a token"
    )
    assert (
        [event.finish_reason for event in own if event.finish_reason]
        == [own[-1].finish_reason]
        == [request.finish_reason]
    )
    assert request.finish_reason in REASONS[request.state]
    assert (request.error is not None) == (request.state is RequestState.FAILED)
    assert request.finish_reason != "length" or len(request.output_tokens) == request.max_tokens


def stamped_in_order(request: Request) -> None:
    """Assert that the request's time stamps rise and agree with its history."""
    ran = [request.scheduled_at] if request.scheduled_at is not None else []
    stamps = [request.arrived_at, *ran, *request.token_times, request.finished_at]
    assert stamps == sorted(stamps) and len(request.token_times) == len(request.output_tokens)
    entered = [at for _, at in request.history]
    assert (
        entered == sorted(entered)
        and entered[-1] == request.finished_at
        and entered[0] >= request.arrived_at
    )
    assert request.first_token_at == (request.token_times[0] if request.token_times else None)
    if ran:
        assert request.history[0] == (RequestState.PREFILLING, request.scheduled_at)


def books_agree(engine: cl.Engine) -> None:
    """Assert after a step that no block of pool or swap is lost or held twice, that engine and
    scheduler list the same requests, and that the shares sum to one.
    """
    blocks, swap, stats = engine.cache.blocks, engine.cache.swap, engine.stats()
    blocks.check()
    if swap:
        swap.check()
        assert {*swap.tables} == {
            each.swapped for each in engine.scheduler.waiting if each.swapped is not None
        }, "swapped requests are waiting requests"
    assert stats.free_blocks + stats.used_blocks == blocks.num_blocks
    assert {*blocks.tables} == {request.table for request in engine.scheduler.running}
    assert {*engine.requests.values()} == {*engine.scheduler.running, *engine.scheduler.waiting}
    assert len(engine.scheduler.running) <= engine.scheduler.max_batch_size
    waiting = {request.state for request in engine.scheduler.waiting}
    assert waiting <= {RequestState.PENDING, RequestState.PREEMPTED}, f"in the queue: {waiting}"
    running = {request.state for request in engine.scheduler.running}
    assert running <= {RequestState.PREFILLING, RequestState.DECODING}, f"in the batch: {running}"
    if stats.token_share is not None:
        shares = stats.token_share, stats.empty_share, stats.external_share
        assert min(shares) >= 0 and abs(sum(shares) - 1) < 1e-9


def nothing_is_left(engine: cl.Engine) -> None:
    """Assert that every block of pool and swap is free and that no request is left."""
    stats = engine.stats()
    assert (stats.free_blocks, stats.used_blocks, stats.num_running, stats.num_waiting) == (
        engine.cache.blocks.num_blocks,
        0,
        0,
        0,
    )
    assert not engine.requests and not engine.cache.blocks.tables
    if engine.cache.swap:
        assert (
            stats.num_swapped == 0 and engine.cache.swap.free_blocks == engine.cache.swap.num_blocks
        )


def play(model, reference, options: dict, load: list[Arrival]) -> tuple[cl.Engine, list[Request]]:
    """Serve a load step by step, with its cancels and second turns, and assert the invariants above
    after every step and for every request.
    """
    records = []
    engine = cl.Engine(model, on_step=records.append, **options)
    coming, requests, events = deque(load), [], []
    turns: dict[Request, int] = {}
    cancels: dict[Request, int] = {}
    step, due = 0, load[0].wait

    def submit(prompt, arrival: Arrival, turns_left: int) -> None:
        sampling = (
            {}
            if arrival.seed is None
            else {"sampling": {"temperature": TEMPERATURE}, "seed": arrival.seed}
        )
        request = engine.submit(prompt, arrival.max_tokens, priority=arrival.priority, **sampling)
        requests.append(request)
        reference.seeds[request] = arrival.seed
        if turns_left > 1:
            turns[request] = turns_left, arrival
        if arrival.cancel is not None:
            cancels[request] = step + arrival.cancel

    while coming or engine.requests:
        while coming and step >= due:
            arrival = coming.popleft()
            submit(arrival.prompt(engine.runner.vocabulary), arrival, arrival.turns)
            due += coming[0].wait if coming else 0
        for request in [request for request, when in cancels.items() if step >= when]:
            del cancels[request]
            engine.cancel(request.id)
        told = engine.step()
        events += told
        assert (
            max(
                Counter(event.request_id for event in told if event.token is not None).values(),
                default=0,
            )
            <= 1
        )
        books_agree(engine)
        for request in [request for request in turns if request.state in ENDS]:
            left, arrival = turns.pop(request)
            if request.state is RequestState.FINISHED:
                submit([*request.prompt, *request.output_tokens, *range(TURN)], arrival, left - 1)
        step += 1
        assert step < 20_000, "the engine does not finish"
    events += engine.run()
    nothing_is_left(engine)
    assert all(
        record.num_prefill_tokens + record.num_decode_tokens <= engine.scheduler.max_step_tokens
        for record in records
    )
    for request in requests:
        ended_once(request, events)
        stamped_in_order(request)
        assert request.state is not RequestState.FAILED, request.error
        reference.check_any(request, TEMPERATURE)
    return engine, requests
