"""The engine against its reference: under every strategy and setting, a request's tokens are those
of mlx-lm, one sequence at a time.
"""

import mlx.core as mx
import numpy as np
import pytest
from conftest import address, prompts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import llama

import cortexlab as cl
from cortexlab.allocators import GROWTHS, STRATEGIES, FirstFit
from cortexlab.bench.mlx_lm import first_difference
from cortexlab.engine import mlx_lm_hook
from cortexlab.engine.attention import windows
from cortexlab.engine.mlx_lm_hook import ATTENTION
from cortexlab.options import ATTENTION_METHODS, OOM_POLICIES
from cortexlab.scheduler.request import RequestState

# Lengths of prompts, 1 to 600 tokens, block edges among them.
LENGTHS = [1, 600, 2, 100, 16, 17, 257, 33, 5, 48, 15, 64, 128, 3, 200, 31]


def tokens_told(events, request) -> list[int]:
    return [event.token for event in events if event.request_id == request.id]


def serve(model, prompts, max_tokens=8, **options):
    """Engine and ended requests of ``prompts``, whose events have told their tokens."""
    engine = cl.Engine(model, **options)
    requests = [engine.submit(prompt, max_tokens) for prompt in prompts]
    events = list(engine.run())
    engine.cache.blocks.check()
    assert engine.stats().used_blocks == 0
    for request in requests:
        assert tokens_told(events, request) == request.output_tokens
    return engine, requests


@pytest.mark.cpu  # near ties are measured in float32, which SmolLM2 has on the CPU only
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_the_default_model_yields_the_reference_tokens_under_every_strategy(
    smollm2, smollm2_reference, strategy, batch_size
):
    options = {"num_blocks": 320, "max_seq_len": 640, "max_batch_size": batch_size}
    _, requests = serve(smollm2[0], prompts_of(LENGTHS, 49152), strategy=strategy, **options)
    assert sum(smollm2_reference.check(request) for request in requests) >= len(requests) - 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
@pytest.mark.parametrize("attention", ATTENTION_METHODS)
def test_a_tiny_model_yields_the_reference_tokens_under_every_strategy_and_attention(
    tiny, tiny_reference, ways, strategy, batch_size, attention
):
    options = {"num_blocks": 320, "max_seq_len": 640, "max_batch_size": batch_size}
    options |= {"strategy": strategy, "attention": attention}
    engine, requests = serve(tiny, prompts_of(LENGTHS, 256), 24, **options)
    assert all(tiny_reference.check(request) for request in requests)
    gathered = "gather" in ways[engine.cache.arena]
    if STRATEGIES[strategy].growth != "relocate":
        assert (engine.stats().copied_bytes > 0) == gathered, "only gather and relocation copy"
    if attention != "auto" or strategy != "paged":
        assert gathered == (attention == "gather"), "`auto` gathers many short extents only"


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    strategy=st.sampled_from([*STRATEGIES, FirstFit]),
    growth=st.sampled_from([None, *GROWTHS]),
    oom_policy=st.sampled_from([policy for policy in OOM_POLICIES if policy != "fail"]),
    attention=st.sampled_from(ATTENTION_METHODS),
    block_size=st.sampled_from([1, 3, 16, 64]),
    batch_size=st.integers(1, 9),
    step_tokens=st.integers(9, 200),  # at least the largest batch size
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
)
def test_every_setting_yields_the_reference_tokens(
    tiny,
    tiny_reference,
    strategy,
    growth,
    oom_policy,
    attention,
    block_size,
    batch_size,
    step_tokens,
    lengths,
):
    _, requests = serve(
        tiny,
        prompts_of(lengths, 256),
        12,
        num_blocks=-(-300 // block_size),
        block_size=block_size,
        strategy=strategy,
        growth=growth,
        oom_policy=oom_policy,
        attention=attention,
        max_batch_size=batch_size,
        max_step_tokens=step_tokens,
        max_seq_len=140,
    )
    for request in requests:
        tiny_reference.check(request)


def test_out_of_memory_under_fail_ends_one_request_and_no_other(tiny, tiny_reference):
    options = {"strategy": "cortexstream", "oom_policy": "fail", "max_batch_size": 4}
    engine = cl.Engine(tiny, num_blocks=8, **options)
    first, second = (engine.submit(prompt, 8) for prompt in prompts_of([60, 90], 256))
    events = list(engine.run())
    assert (second.state, second.finish_reason) == (RequestState.FAILED, "error")
    assert "out of KV memory" in second.error
    assert cl.TokenEvent(second.id, None, "error") in events
    assert first.state is RequestState.FINISHED and tiny_reference.check(first)


def test_a_pool_too_small_for_all_requests_preempts_and_yields_the_reference_tokens(
    tiny, tiny_reference
):
    prompts = prompts_of([30] * 6, 256)
    for policy in ("wait", "preempt"):
        options = {"strategy": "paged", "oom_policy": policy, "max_batch_size": 6}
        engine, requests = serve(tiny, prompts, 40, num_blocks=9, **options)
        preemptions = [request.num_preemptions for request in requests]
        assert engine.stats().num_preemptions == sum(preemptions) > 0
        assert all(tiny_reference.check(request) for request in requests)


def test_cancel_frees_blocks_at_once_and_the_other_requests_go_on(tiny, tiny_reference):
    engine = cl.Engine(tiny, num_blocks=64)
    running, kept = (engine.submit(prompt, 20) for prompt in prompts_of([40, 50], 256))
    engine.step()
    waiting = engine.submit(prompts_of([10], 256)[0], 4)
    assert engine.cancel(running.id) and engine.cancel(waiting.id)
    assert not engine.cancel("unknown")
    assert [event.finish_reason for event in engine.step()][:2] == ["cancelled", "cancelled"]
    list(engine.run())
    assert running.state is waiting.state is RequestState.CANCELLED
    assert tiny_reference.check(kept) and engine.stats().used_blocks == 0


def test_a_stop_token_ends_a_request_and_is_its_last_token(tiny, tiny_reference):
    prompt = prompts_of([20], 256)[0]
    tokens = [token for token, _ in tiny_reference.steps(prompt, 10)]
    stop = tokens[4]
    engine = cl.Engine(tiny, num_blocks=8)
    request = engine.submit(prompt, 10, stop_token_ids=[stop])
    list(engine.run())
    assert request.finish_reason == "stop"
    assert request.output_tokens == tokens[: tokens.index(stop) + 1]


def test_time_stamps_of_a_request_are_in_order(tiny):
    engine = cl.Engine(tiny, num_blocks=64)
    request = engine.submit([1, 2, 3], 5)
    list(engine.run())
    stamps = [request.arrived_at, request.scheduled_at, request.first_token_at]
    stamps += [*request.token_times, request.finished_at]
    assert stamps == sorted(stamps) and len(request.token_times) == 5


@pytest.mark.parametrize(
    ("prompt", "options", "names"),
    [
        ([], {}, "empty"),
        ([1, 256], {}, "256"),
        ([1, -1], {}, "-1"),
        ([1, 2.5], {}, "2.5"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1] * 100, {"max_tokens": 100}, "max_seq_len"),
        ([1], {"request_id": "taken"}, "taken"),
        ([1], {"stop_token_ids": [999]}, "999"),
        ("text", {}, "tokenizer"),
        ([1], {"sampling": {"temprature": 1}}, "temprature"),
        ([1], {"sampling": {"temperature": -1}}, "-1"),
        ([1], {"sampling": {"top_p": 2}}, "2"),
        ([1], {"sampling": "hot"}, "hot"),
        ([1], {"seed": "x"}, "seed"),
        ([1], {"logprobs": -1}, "logprobs"),
        ([1], {"logprobs": 1000}, "1000"),
        ([1], {"logits_processors": [3]}, "3"),
        ([1], {"logits_processors": 3}, "logits_processors"),
        ([1], {"stop": "end"}, "tokenizer"),
        ([1], {"stop": 3}, "stop"),
        ([1], {"priority": "high"}, "priority"),
        ([1], {"on_token": "print"}, "on_token"),
        ([1], {"ignore_eos": "yes"}, "ignore_eos"),
        ([1], {"arrived_at": float("nan")}, "arrived_at"),
        ([1], {"request_id": 7}, "request_id"),
    ],
)
def test_a_bad_request_is_refused_by_name_and_the_engine_goes_on(
    tiny, tiny_reference, prompt, options, names
):
    engine = cl.Engine(tiny, num_blocks=8)
    good = engine.submit([5, 6, 7], 6, request_id="taken")
    engine.step()
    with pytest.raises(ValueError, match=names) as error:
        engine.submit(prompt, **{"max_tokens": 4} | options)
    assert isinstance(error.value, cl.CortexLabError) and "\n" not in str(error.value)
    list(engine.run())
    assert tiny_reference.check(good) and not engine.requests


def test_a_request_that_can_never_fit_the_strategy_is_refused(tiny):
    engine = cl.Engine(tiny, num_blocks=8, block_size=16, strategy="paged", max_seq_len=1000)
    with pytest.raises(ValueError, match="can never fit"):
        engine.submit([1] * 120, 10)
    engine.submit([1] * 120, 9)  # 128 slots: a request's last token is never written


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 0},
        {"block_size": 0},
        {"max_batch_size": 0},
        {"max_step_tokens": 3},
        {"strategy": "best"},
        {"growth": "x"},
        {"attention": "x"},
        {"oom_policy": "x"},
        {"watermark": 1.5},
        {"preemption": "x"},
        {"swap_blocks": 4},
        {"preemption": "swap", "swap_blocks": 0},
        {"prefix_caching": "yes"},
        {"prefix_caching": True, "strategy": "static"},
        {"prefix_caching": True, "strategy": "cortexstream_buddy"},
        {"pipeline": "x"},
        {"clock": 3},
        {"on_step": 3},
    ],
)
def test_bad_settings_are_refused_in_one_line(tiny, options):
    with pytest.raises(cl.BadInput) as error:
        cl.Engine(tiny, **{"num_blocks": 8} | options)
    assert "\n" not in str(error.value)


def test_mlx_lm_gets_its_own_attention_back_after_a_step_and_after_an_exception(tiny, monkeypatch):
    before = getattr(llama, ATTENTION)
    inner = tiny.model
    engine = cl.Engine(tiny, num_blocks=8)
    engine.submit([1, 2, 3], 2)
    engine.step()
    assert getattr(llama, ATTENTION) is before and tiny.model is inner
    monkeypatch.setattr(mlx_lm_hook.LayerCache, "attend", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert getattr(llama, ATTENTION) is before


def test_two_engines_in_one_process_do_not_disturb_each_other(tiny, tiny_reference):
    engines = [cl.Engine(tiny, num_blocks=32, strategy=name) for name in ("paged", "cortexstream")]
    prompts = prompts_of([30, 40], 256)
    requests = [engine.submit(prompt, 10) for engine, prompt in zip(engines, prompts, strict=True)]
    while any(engine.requests for engine in engines):
        for engine in engines:
            engine.step()
    assert all(tiny_reference.check(request) for request in requests)


@pytest.mark.cpu  # a GPU's command buffer may hold an array after its evaluation
@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("products_a_stream", [1, 200])
def test_a_step_writes_the_arena_in_place(tiny, monkeypatch, pipeline, products_a_stream):
    """The addresses of every layer's K and V stay the same through prefill and decode, under all
    attention methods.
    """
    monkeypatch.setattr(windows, "PRODUCTS_A_STREAM", products_a_stream)
    for attention in ATTENTION_METHODS:
        options = {"attention": attention, "max_batch_size": 4, "pipeline": pipeline}
        engine = cl.Engine(tiny, num_blocks=64, **options)
        engine.cache.warmup()
        before = [address(array) for array in engine.cache.arena.arrays()]
        for prompt in prompts_of([20, 30, 40, 50], 256):
            engine.submit(prompt, 6)
        list(engine.run())
        after = [address(array) for array in engine.cache.arena.arrays()]
        assert after == before, f"{attention} copied the arena"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("strategy", ["paged", "cortexstream"])
def test_sixteen_bit_models_yield_the_reference_tokens_also_after_a_swap(dtype, strategy):
    model = cl.load_model("tiny")[0]
    model.set_dtype(dtype)
    roomy = {"num_blocks": 64, "max_batch_size": 10}
    # Three requests fit; the others go to the host and come back.
    tight = {"num_blocks": 9, "watermark": 0.0, "oom_policy": "preempt", "preemption": "swap"}
    for num_requests, max_tokens, options in ((10, 12, roomy), (6, 24, tight)):
        prompts = prompts_of([20] * num_requests, 256)
        for request in serve(model, prompts, max_tokens, strategy=strategy, **options)[1]:
            difference = first_difference(model, request.prompt, request.output_tokens)
            assert difference is None or difference.near_tie


@pytest.mark.cpu  # on other devices `mx.gather_mm` takes 16 bits too
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_windows_are_refused_for_a_sixteen_bit_model(dtype):
    model = cl.load_model("tiny")[0]
    model.set_dtype(dtype)
    with pytest.raises(cl.BadInput, match="float32"):
        cl.Engine(model, num_blocks=64, attention="windows")


def test_a_step_that_raises_loses_no_token_and_no_event(tiny, tiny_reference, monkeypatch):
    engine = cl.Engine(tiny, num_blocks=64)
    requests = [engine.submit(prompt, 10) for prompt in prompts_of([30, 7, 50], 256)]
    gone = engine.submit([1, 2], 5)
    events = engine.step() + engine.step()
    engine.cancel(gone.id)
    with monkeypatch.context() as broken:
        broken.setattr(mlx_lm_hook.LayerCache, "attend", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    events += engine.run()
    assert all(tiny_reference.check(request) for request in requests)
    assert cl.TokenEvent(gone.id, None, "cancelled") in events
    for request in requests:
        assert tokens_told(events, request) == request.output_tokens


def test_prompts_may_be_arrays_and_default_ids_avoid_ids_in_use(tiny):
    engine = cl.Engine(tiny, num_blocks=16)
    engine.submit([1], 2, request_id="request-1")
    requests = [engine.submit(np.array([1, 2, 3]), 2), engine.submit(mx.array([1, 2, 3]), 2)]
    assert [request.prompt for request in requests] == [(1, 2, 3)] * 2
    for bad in (5, None, [[1, 2]], "text"):
        with pytest.raises(cl.BadInput, match="prompt"):
            engine.submit(bad, 2)
