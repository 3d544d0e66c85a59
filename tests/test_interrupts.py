"""An exception at any line of a run loses nothing, and leaves no wrong token."""

import random
import signal
import threading

import pytest
from conftest import prompts_of
from interrupts import LENGTHS, MAX_TOKENS, MODES, interrupted_run

import cortexlab as cl

STRIDE = 53  # lines between the interrupts of two runs; `soak_engine.py` takes 4


@pytest.fixture(scope="module")
def right(tiny, tiny_reference):
    """Tokens by prompt and length."""
    prompts = [tuple(prompt) for prompt in prompts_of(LENGTHS, 256)]
    return {
        (prompt, MAX_TOKENS): [token for token, _ in tiny_reference.steps(prompt, MAX_TOKENS)]
        for prompt in prompts
    }


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_at_any_line_loses_no_event_and_no_block(tiny, right, mode):
    at = 1
    while interrupted_run(tiny, right, MODES[mode], at):
        at += STRIDE
    assert at > 5000, "a run has that many lines"


@pytest.mark.parametrize("mode", MODES)
def test_a_second_exception_while_the_first_is_mended_loses_nothing_either(tiny, right, mode):
    rng = random.Random(7)
    for _ in range(60):
        at, again = rng.randrange(1, 6000), rng.randrange(1, rng.choice([60, 200, 800]))
        interrupted_run(tiny, right, MODES[mode], at, again)


def test_the_pools_of_the_tight_modes_preempt_twice_in_every_run(tiny):
    for mode in ("swap", "preempt"):
        engine = cl.Engine(tiny, **MODES[mode])
        for prompt in prompts_of(LENGTHS, 256):
            engine.submit(prompt, MAX_TOKENS)
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


def test_an_exception_in_another_threads_submit_or_cancel_harms_no_step(
    tiny, tiny_reference, monkeypatch
):
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
