"""Options of a request: sampling, seeds, stops, log-probabilities, streamed text, priorities and
shared prefixes. A user's function that raises ends its own request alone.
"""

import mlx.core as mx
import pytest
from conftest import prompts_of
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import cortexlab as cl
from cortexlab.allocators import make_allocator
from cortexlab.scheduler.request import RequestState

SAMPLING = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.02,
    "repetition_penalty": 1.3,
    "logit_bias": {3: 1.5},
}


def alone(model, prompt, max_tokens, seed):
    """``(token, log-probabilities)`` of each step that mlx-lm samples with `SAMPLING`."""
    mx.random.seed(seed)
    sampler = make_sampler(0.8, top_p=0.9, top_k=40, min_p=0.02)
    processors = make_logits_processors({3: 1.5}, repetition_penalty=1.3)
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=processors,
    )
    return [(int(token), logprobs) for token, logprobs in steps]


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_seed_gives_the_tokens_of_mlx_lm_in_any_batch(tiny, pipeline):
    prompts = prompts_of([1, 30, 77, 5], 256)
    before = mx.random.state[0].tolist()
    engine = cl.Engine(
        tiny,
        num_blocks=10,
        strategy="runs",
        oom_policy="preempt",
        watermark=0.0,
        max_step_tokens=32,
        pipeline=pipeline,
    )
    requests = [
        engine.submit(prompt, 12, sampling=SAMPLING, seed=i, logprobs=2)
        for i, prompt in enumerate(prompts)
    ]
    list(engine.run())
    assert mx.random.state[0].tolist() == before and engine.stats().num_preemptions > 0
    for seed, request in enumerate(requests):
        expected = alone(tiny, request.prompt, 12, seed)
        assert request.output_tokens == [token for token, _ in expected]
        for told, (token, logprobs) in zip(request.logprobs, expected, strict=True):
            assert next(iter(told)) == token and set(mx.argsort(-logprobs)[:2].tolist()) <= set(
                told
            )
            assert told[token] == pytest.approx(logprobs[token].item(), abs=1e-3)


def broken(*_):
    """A user's function that raises with a message of two lines."""
    raise RuntimeError("no\nluck")


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"sampling": broken},
        {"sampling": lambda logprobs: mx.array([99999])},
        {"sampling": lambda logprobs: logprobs},
        {"logits_processors": [broken]},
        {"logits_processors": [lambda tokens, logits: logits[:, :5]]},
        {"on_token": broken},
        {"stop": broken},
    ],
)
def test_a_users_function_that_fails_ends_its_own_request_and_no_other(
    tiny, tiny_reference, options, pipeline
):
    engine = cl.Engine(tiny, num_blocks=64, pipeline=pipeline)
    good, bad, other = (
        engine.submit(p, 8, **more)
        for p, more in zip(prompts_of([20, 9, 33], 256), ({}, options, {}), strict=True)
    )
    events = list(engine.run())
    assert (
        (bad.state, bad.finish_reason) == (RequestState.FAILED, "error")
        and bad.error
        and "\n" not in bad.error
    )
    assert [event for event in events if event.request_id == bad.id][-1] == cl.TokenEvent(
        bad.id, None, "error"
    )
    assert (
        tiny_reference.check(good)
        and tiny_reference.check(other)
        and engine.stats().used_blocks == 0
    )


def test_a_loop_over_run_that_breaks_off_loses_no_event(tiny, tiny_reference):
    engine = cl.Engine(tiny, num_blocks=64)
    requests = [engine.submit(prompt, 6) for prompt in prompts_of([20, 9, 33], 256)]
    events = []
    while engine.requests:
        for event in engine.run():
            events.append(event)
            break
    events += engine.run()
    for request in requests:
        assert tiny_reference.check(request)
        assert [
            event.token for event in events if event.request_id == request.id
        ] == request.output_tokens


@pytest.mark.parametrize("pipeline", [False, True])
def test_text_comes_whole_and_a_stop_string_is_never_shown(smollm2, pipeline):
    model, tokenizer = smollm2
    plain = cl.Engine(model, num_blocks=64, tokenizer=tokenizer)
    whole = plain.submit("The capital of France is", 12)
    shown = "".join(event.text for event in plain.run())
    assert (
        shown
        == whole.text
        == tokenizer.decode([t for t in whole.output_tokens if t not in tokenizer.eos_token_ids])
    )
    stop = whole.text[3:8]  # a stop string that begins inside a token
    engine = cl.Engine(model, num_blocks=64, tokenizer=tokenizer, pipeline=pipeline)
    cut = engine.submit("The capital of France is", 12, stop=stop)
    events = list(engine.run())
    assert (
        "".join(event.text for event in events) == cut.text == whole.text[: whole.text.index(stop)]
    )
    assert cut.finish_reason == "stop" and len(events) == len(cut.output_tokens) < 12


def test_the_lowest_priority_runs_first_and_is_never_preempted(tiny, tiny_reference):
    engine = cl.Engine(tiny, num_blocks=6, max_batch_size=2, oom_policy="preempt", watermark=0.0)
    late, urgent, middle = (
        engine.submit(p, 30, priority=n)
        for p, n in zip(prompts_of([30, 30, 30], 256), (2, 0, 1), strict=True)
    )
    ended = [event.request_id for event in engine.run() if event.finish_reason]
    assert (
        ended == [urgent.id, middle.id, late.id]
        and urgent.num_preemptions == 0 < middle.num_preemptions + late.num_preemptions
    )
    assert all(tiny_reference.check(request) for request in (late, urgent, middle))


def test_a_shared_block_that_is_not_computed_yet_is_not_copied_from(tiny, tiny_reference):
    """Three requests of one step: the second shares the first's whole block, and the third begins
    with three tokens of that block.
    """
    first = prompts_of([60], 256)[0]
    engine = cl.Engine(tiny, num_blocks=32, prefix_caching=True)
    requests = [
        engine.submit(prompt, 4) for prompt in (first, [*first[:20], *range(20)], first[:3])
    ]
    list(engine.run())
    assert [request.cached_tokens for request in requests] == [0, 16, 0]
    assert all(tiny_reference.check(request) for request in requests)


@pytest.mark.parametrize("strategy", ["cortexstream", "segregated", "buddy", "paged", "runs"])
def test_a_shared_prompt_is_held_once_and_copied_where_it_parts_inside_a_block(
    tiny, tiny_reference, strategy
):
    """Prompts a and b share 64 tokens, four whole blocks; c shares 72 with a, and the eight tokens
    in the fifth block are copied.
    """
    (common, own, other) = prompts_of([64, 20, 20], 256)
    engine = cl.Engine(tiny, num_blocks=64, strategy=strategy, prefix_caching=True)
    a = engine.submit(common + own, 6)
    list(engine.run())
    b = engine.submit(common + other, 6)
    engine.step()
    assert (b.cached_tokens, engine.stats().copied_bytes) == (64, 0)
    if strategy in ("cortexstream", "paged", "runs"):
        assert len(b.table.all_extents) <= 2, "shared blocks lie in one extent"
    list(engine.run())
    before = engine.stats().copied_bytes  # relocation may have copied some
    c = engine.submit(common + own[:8] + other, 6)
    engine.step()
    assert (
        c.cached_tokens == 72
        and engine.stats().copied_bytes - before == 8 * engine.cache.arena.slot_bytes
    )
    list(engine.run())
    assert all(tiny_reference.check(request) for request in (a, b, c))
    assert (engine.stats().used_blocks, engine.stats().free_blocks) == (
        0,
        64,
    ) and engine.stats().prefix_hit_rate > 0


@pytest.mark.parametrize("name", ["first_fit", "best_fit", "segregated", "paged", "runs"])
def test_blocks_split_off_an_extent_are_freed_one_by_one(name):
    allocator = make_allocator(name, 32)
    whole = allocator.allocate(10)
    singles, rest = allocator.split(whole, 4)
    allocator.check()
    assert [one[0] for one in singles] == [
        (block, 1) for extent in whole for block in range(extent.start, extent.end)
    ][:4]
    with pytest.raises(ValueError):
        allocator.free(whole)
    for one in singles[::-1]:
        allocator.free(one)
    assert allocator.stats().free_blocks == 26 and allocator.extend(rest, 2) is not None
    allocator.check()
    with pytest.raises(ValueError, match="num_blocks"):
        allocator.split(allocator.allocate(2), 3)
