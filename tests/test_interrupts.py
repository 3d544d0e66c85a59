"""An exception at any line of a run loses nothing, and leaves no wrong token."""

import random
import signal
import threading

import pytest
from conftest import prompts_of
from interrupts import MODES, engine_for, interrupted_run, right_tokens, submit

import cortexlab as cl

STRIDE = 53  # lines between the interrupts of two runs; `soak_interrupts.py` takes 4


@pytest.fixture(scope="module", params=MODES)
def mode(request, tiny):
    """A mode, and the right tokens of its requests."""
    return request.param, right_tokens(tiny, request.param)


def test_an_exception_at_any_line_loses_no_event_and_no_block(tiny, mode):
    at = 1
    while interrupted_run(tiny, *mode, at):
        at += STRIDE
    assert at > 5000, "a run has that many lines"


def test_a_second_exception_while_the_first_is_mended_loses_nothing_either(tiny, mode):
    rng = random.Random(7)
    for _ in range(60):
        at, again = rng.randrange(1, 6000), rng.randrange(1, rng.choice([60, 200, 800]))
        interrupted_run(tiny, *mode, at, again)


def test_the_pools_of_the_tight_modes_preempt_twice_in_every_run(tiny):
    for mode in ("swap", "preempt"):
        engine = engine_for(tiny, mode)
        submit(engine, mode, [])
        list(engine.run())
        assert engine.stats().num_preemptions >= 2


def test_a_signal_handler_may_cancel_submit_and_ask_while_the_books_are_open(
    tiny, tiny_reference, monkeypatch
):
    engine = cl.Engine(tiny, num_blocks=64)
    kept, victim = (engine.submit(prompt, 8) for prompt in prompts_of([20, 9], 256))
    engine.step()
    asked, schedule = [], engine.scheduler.schedule

    def handler(*_):
        asked.append(engine.submit([3, 4, 5], 6))
        engine.cancel(victim.id)
        engine.stats()

    def interrupted(*args):
        if not asked:
            signal.raise_signal(signal.SIGUSR1)
        return schedule(*args)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        monkeypatch.setattr(engine.scheduler, "schedule", interrupted)
        events = list(engine.run())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert victim.finish_reason == "cancelled"
    assert all(tiny_reference.check(each) for each in (kept, *asked))
    assert sum(event.finish_reason is not None for event in events) == 3


def test_an_exception_in_another_threads_submit_harms_no_step(tiny, tiny_reference, monkeypatch):
    engine = cl.Engine(tiny, num_blocks=64, prefix_caching=True)
    requests = [engine.submit(prompt, 40) for prompt in prompts_of([20, 33, 9], 256)]
    add, raised = engine.scheduler.add, []

    def interrupted(request):
        add(request)
        raised.append(request)
        raise KeyboardInterrupt

    stepper = threading.Thread(target=lambda: list(engine.run()))
    monkeypatch.setattr(engine.scheduler, "add", interrupted)
    stepper.start()
    for prompt in prompts_of([11, 12, 13], 256):
        with pytest.raises(KeyboardInterrupt):
            engine.submit(prompt, 5)
    stepper.join(60)
    assert not stepper.is_alive() and len(raised) == 3
    assert all(tiny_reference.check(each) for each in requests)
    assert not engine.requests, "a request that was not accepted does not run"
    engine.cache.blocks.check()
