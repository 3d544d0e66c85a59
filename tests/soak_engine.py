"""Long runs of the engine under load, beyond the time of the tests.

    python tests/soak_engine.py --examples 0 --requests 2000 --seed 1

First the matrix: every combination of `engine_cases.PRODUCT`, or ``--examples`` of them, each with
a random load and settings drawn from `engine_cases.DRAWN`. Then ``--requests`` requests in a pool
that is too small for the batch, with each kind of preemption. The invariants stand in
`engine_cases`. A failure names the seed and the case, and the exit code is 1.
"""

import argparse
import random
import sys
import time
from collections import Counter
from itertools import product

import engine_cases
import mlx.core as mx
from conftest import Reference

import cortexlab as cl

MEMORY = 0.02  # largest relative difference of active memory, last to second tenth of the steps


def matrix(model, examples: int, seed: int) -> int:
    """Play the combinations of settings; returns the number of requests served."""
    rng = random.Random(seed)
    cases = [
        dict(zip(engine_cases.PRODUCT, values, strict=True))
        for values in product(*engine_cases.PRODUCT.values())
    ]
    rng.shuffle(cases)
    served = 0
    for number, case in enumerate(cases[: examples or None]):
        own = random.Random(f"{seed} {number}")
        case |= engine_cases.drawn(engine_cases.DRAWN, own)
        load = engine_cases.random_load(own)
        try:
            _, requests = engine_cases.play(
                model, Reference(model), engine_cases.engine_options(case, load), load
            )
        except Exception as error:
            raise AssertionError(
                f"matrix, seed {seed}, case {number}: {error!r}\n{case}\n{load}"
            ) from error
        served += len(requests)
    return served


def soak(
    model, reference, num_requests: int, seed: int, preemption: str, pipeline: bool = False
) -> dict:
    """Serve random requests, some cancelled, in a pool for a tenth of the largest batch; returns
    counts. `AssertionError` for a broken invariant.
    """
    rng = random.Random(f"{seed} {preemption}")
    load = [
        engine_cases.Arrival(**engine_cases.drawn(engine_cases.ARRIVAL, rng))
        for _ in range(num_requests)
    ]
    longest = sorted(-(-arrival.longest // 16) for arrival in load)
    # Blocks for a tenth of the 32 longest requests, and for any single request.
    blocks = max(sum(longest[-32:]) // 10, longest[-1] + 1)
    engine = cl.Engine(
        model,
        num_blocks=blocks,
        max_batch_size=32,
        max_step_tokens=256,
        oom_policy="preempt",
        watermark=0.0,
        preemption=preemption,
        prefix_caching=True,
        pipeline=pipeline,
    )
    requests, events, memory = [], Counter(), []
    cancels: dict[str, int] = {}
    step = 0
    while load or engine.requests:
        while load and len(engine.requests) < 64:
            arrival = load.pop()
            sampling = (
                {}
                if arrival.seed is None
                else {"sampling": {"temperature": engine_cases.TEMPERATURE}, "seed": arrival.seed}
            )
            request = engine.submit(
                arrival.prompt(engine.runner.vocabulary),
                arrival.max_tokens,
                priority=arrival.priority,
                **sampling,
            )
            reference.seeds[request] = arrival.seed
            requests.append(request)
            if arrival.cancel is not None:
                cancels[request.id] = step + arrival.cancel
        for name in [name for name, when in cancels.items() if step >= when]:
            del cancels[name]
            engine.cancel(name)
        events.update(event.request_id for event in engine.step() if event.finish_reason)
        engine_cases.books_agree(engine)
        mx.clear_cache()
        memory.append(mx.get_active_memory())
        step += 1
    events.update(event.request_id for event in engine.run() if event.finish_reason)
    engine_cases.nothing_is_left(engine)
    assert events == Counter(request.id for request in requests), "a request ended twice, or never"
    for request in requests:
        states = [state for state, _ in request.history]
        assert (
            sum(state in engine_cases.ENDS for state in states) == 1 and states[-1] is request.state
        )
        assert request.state is not engine_cases.RequestState.FAILED, request.error
        engine_cases.stamped_in_order(request)
    for request in requests[:: max(1, num_requests // 200)]:
        reference.check_any(request, engine_cases.TEMPERATURE)
    tenth = max(1, len(memory) // 10)
    early, late = (sum(part) / len(part) for part in (memory[tenth : 2 * tenth], memory[-tenth:]))
    assert abs(late / early - 1) <= MEMORY, (
        f"active memory went from {early:.0f} to {late:.0f} bytes"
    )
    stats = engine.stats()
    assert stats.num_preemptions, "no request was preempted: the pool is too large"
    return {
        "requests": len(requests),
        "steps": step,
        "blocks": blocks,
        "tokens": sum(len(request.output_tokens) for request in requests),
        "cancelled": sum(request.finish_reason == "cancelled" for request in requests),
        "preemptions": stats.num_preemptions,
        "copied MB": round(stats.copied_bytes / 1e6),
        "prefix hits": round(stats.prefix_hit_rate, 3),
        "memory": round(late / early, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--examples", type=int, default=0, help="cases of the matrix; 0 (default): all"
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    model = cl.load_model("tiny")[0]
    jobs = {
        "matrix": lambda: (
            f"{matrix(model, given.examples, given.seed)} requests with mlx-lm's tokens"
        )
    }
    for preemption in engine_cases.PREEMPTIONS:
        for pipeline in (False, True):
            name = f"{preemption}{', pipelined' if pipeline else ''}"
            jobs[name] = lambda p=preemption, q=pipeline: soak(
                model, Reference(model), given.requests, given.seed, p, q
            )
    failed = False
    for name, job in jobs.items():
        started = time.perf_counter()
        try:
            found = job()
        except AssertionError as error:
            failed, found = True, f"FAILED: {error}"
        print(
            f"{name:22} seed {given.seed}, {time.perf_counter() - started:6.1f} s: {found}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
