"""The engine among other people's callbacks and threads: any of them may submit, cancel and ask at
any time, and no token changes.
"""

import subprocess
import sys
import threading

import pytest
from conftest import prompts_of

import cortexlab as cl
from cortexlab.scheduler.request import RequestState

PIPELINES = pytest.mark.parametrize("pipeline", [False, True])


def in_thread(work, *args):
    """What ``work`` returns, or raises, in a thread of its own."""
    done = []

    def run():
        try:
            done.append((work(*args), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the thread hangs"
    result, error = done[0]
    if error is not None:
        raise error
    return result


# --- callbacks ------------------------------------------------------------------------------------


@PIPELINES
def test_a_step_inside_a_callback_is_refused_and_no_token_is_wrong(tiny, tiny_reference, pipeline):
    engine = cl.Engine(tiny, num_blocks=128, pipeline=pipeline)
    asked, refused = [], []

    def tool(event):
        if not asked:
            asked.append(engine.submit([7, 8, 9], 5))
            for call in (engine.step, lambda: list(engine.run())):
                try:
                    call()
                except cl.CortexLabError as error:
                    refused.append(str(error))

    first = engine.submit(list(range(20)), 10, on_token=tool)
    others = [engine.submit(list(range(40, n)), 10) for n in (60, 70, 80)]
    events = list(engine.run())
    assert all(tiny_reference.check(each) for each in (first, *others, *asked))
    assert len(events) == 45 and len(refused) == 2
    assert all("a step is under way" in each and "\n" not in each for each in refused)
    assert first.error is None


@PIPELINES
@pytest.mark.parametrize("where", ["on_token", "stop", "on_step", "sampler", "processor"])
def test_every_callback_may_submit_cancel_and_ask(tiny, tiny_reference, where, pipeline):
    asked, told = [], []

    def use(*args):
        if not asked:
            asked.append(engine.submit([7, 8, 9], 5))
            told.append((engine.cancel(victim.id), engine.stats()["num_running"]))
            engine.forget_prefixes()
        return (
            args[-1]
            if where == "processor"
            else args[0].argmax(-1)
            if args and (where == "sampler")
            else None
        )

    options = {
        "on_token": {"on_token": use},
        "stop": {"stop": use},
        "on_step": {},
        "sampler": {"sampling": use},
        "processor": {"logits_processors": [use]},
    }[where]
    on_step = use if where == "on_step" else None
    engine = cl.Engine(
        tiny, num_blocks=128, prefix_caching=True, pipeline=pipeline, on_step=on_step
    )
    prompts = prompts_of([30, 20, 40], 256)
    user = engine.submit(prompts[0], 8, **options)
    victim = engine.submit(prompts[1], 30)
    kept = engine.submit(prompts[2], 8)
    events = list(engine.run())
    assert told == [(True, 2)]
    assert victim.state is RequestState.CANCELLED and len(victim.output_tokens) < 30
    assert all(tiny_reference.check(each) for each in (user, kept, *asked))
    engine.cache.blocks.check()
    assert engine.stats().used_blocks == 0
    ends = [event.request_id for event in events if event.finish_reason]
    assert sorted(ends) == sorted(each.id for each in (user, victim, kept, *asked))


def test_a_callback_that_waits_for_a_thread_that_uses_the_engine_does_not_hang(
    tiny, tiny_reference
):
    engine = cl.Engine(tiny, num_blocks=64)
    asked, refused = [], []

    def from_elsewhere():
        asked.append(engine.submit([4, 5, 6], 4))
        engine.stats()
        try:
            engine.step()
        except cl.CortexLabError as error:
            refused.append(error)

    def use(logprobs):
        if not asked:
            in_thread(from_elsewhere)
        return logprobs.argmax(-1)

    request = engine.submit([1, 2, 3], 6, sampling=use)
    list(engine.run())
    assert len(refused) == 1
    assert all(tiny_reference.check(each) for each in (request, *asked))


def test_a_step_whose_callback_raises_is_not_a_preemption(tiny, tiny_reference):
    raised = []

    def on_step(record):
        if len(raised) < 3:
            raised.append(record)
            raise OSError("the disk is full")

    engine = cl.Engine(tiny, num_blocks=64, on_step=on_step)
    request = engine.submit([1, 2, 3], 6)
    for _ in range(3):
        with pytest.raises(OSError, match="full"):
            engine.step()
    list(engine.run())
    assert tiny_reference.check(request) and engine.stats()["num_preemptions"] == 0
    assert len({id(record) for record in raised}) == 3, "each step is recorded once"


# --- threads --------------------------------------------------------------------------------------


@PIPELINES
def test_an_engine_made_here_runs_there_and_each_step_may_have_its_own_thread(
    tiny, tiny_reference, pipeline
):
    engine = cl.Engine(tiny, num_blocks=64, pipeline=pipeline)
    first = engine.submit([1, 2, 3], 5)
    in_thread(lambda: list(engine.run()))
    sampling = {"sampling": {"temperature": 0.8}, "seed": 3}
    second, third = engine.submit([5, 6, 7], 8), engine.submit([1, 2, 3, 4], 8, **sampling)
    while engine.requests:
        in_thread(engine.step)
    fourth = engine.submit([9, 8], 4)
    list(engine.run())
    tiny_reference.seeds[third] = 3
    for request in (first, second, third, fourth):
        assert tiny_reference.check_any(request, 0.8)
    assert engine.stats()["num_preemptions"] == 0


@pytest.mark.parametrize("fails_in", ["here", "there"])
def test_an_engine_goes_on_in_another_thread_after_a_step_that_failed(
    tiny, tiny_reference, monkeypatch, fails_in
):
    engine = cl.Engine(tiny, num_blocks=64)
    request = engine.submit(list(range(30)), 8)
    threads = {"here": lambda work: work(), "there": in_thread}
    other = {"here": "there", "there": "here"}[fails_in]
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr("cortexlab.engine.model_runner.ModelRunner.logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            threads[fails_in](engine.step)
    threads[other](lambda: list(engine.run()))
    assert tiny_reference.check(request) and engine.stats()["num_preemptions"] == 0


def test_ten_engines_in_ten_threads_yield_the_reference_tokens(tiny, tiny_reference):
    runner = cl.engine.model_runner.ModelRunner(tiny)  # one runner for all of them
    engines = [cl.Engine(runner, num_blocks=64, max_batch_size=1 + n % 4) for n in range(10)]
    sampling = {"sampling": {"temperature": 0.8}}
    requests = []
    for n, engine in enumerate(engines):
        for i, prompt in enumerate(prompts_of([7 + n, 20, 40], 256)):
            seeded = sampling | {"seed": n} if i == 0 else {}
            requests.append(engine.submit(prompt, 12, **seeded))
            tiny_reference.seeds[requests[-1]] = seeded.get("seed")
    threads = [threading.Thread(target=lambda e=e: list(e.run())) for e in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    for request in requests:
        assert tiny_reference.check_any(request, 0.8)


@PIPELINES
def test_threads_submit_and_cancel_while_one_steps(tiny, tiny_reference, pipeline):
    engine = cl.Engine(
        tiny, num_blocks=60, max_batch_size=6, prefix_caching=True, pipeline=pipeline
    )
    requests, errors, events = [], [], []
    done = threading.Event()

    def client(seed):
        try:
            for i, prompt in enumerate(prompts_of([5 + seed, 17, 33, 20, 48] * 3, 256)):
                request = engine.submit(prompt, 10)
                requests.append(request)
                stats = engine.stats()
                assert stats["used_blocks"] >= stats["num_running"]
                if i % 4 == 3:
                    engine.cancel(request.id)
        except BaseException as error:
            errors.append(error)

    def step():
        try:
            while not done.is_set() or engine.requests:
                events.extend(engine.step())
            events.extend(engine.step())
        except BaseException as error:
            errors.append(error)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
    stepper = threading.Thread(target=step)
    for thread in (stepper, *clients):
        thread.start()
    for thread in clients:
        thread.join(120)
    done.set()
    stepper.join(120)
    assert not stepper.is_alive() and not errors, errors
    assert len(requests) == 45 and len({each.id for each in requests}) == 45
    for request in requests:
        own = [event for event in events if event.request_id == request.id]
        assert [e.token for e in own if e.token is not None] == request.output_tokens
        assert [e.finish_reason for e in own if e.finish_reason] == [request.finish_reason]
        assert tiny_reference.check_any(request, 0)
    engine.cache.blocks.check()
    assert engine.stats().used_blocks == 0


WORKER = """
import threading, cortexlab as cl
model = cl.load_model("tiny")[0] if {here} else None
def work():
    mine = model or cl.load_model("tiny")[0]
    engine = cl.Engine(mine, num_blocks=64)
    request = engine.submit(list(range(40)), 8)
    list(engine.run())
    print(request.state)
threads = [threading.Thread(target=work) for _ in range({threads})]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize(("here", "threads"), [(False, 1), (True, 1), (True, 3)])
def test_a_script_whose_last_thread_to_use_mlx_is_a_worker_ends_with_exit_code_0(here, threads):
    code = WORKER.format(here=here, threads=threads)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["finished"] * threads
