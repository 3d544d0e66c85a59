"""The engine among other people's tokenizers, templates, samplers and weights: text as mlx-lm gives
it, one request's error its own, and nothing silent when the model changes behind its back.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import byte_level, prompts_of
from mlx_lm.generate import generate_step, stream_generate
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import cortexlab as cl
from cortexlab.bench.mlx_lm import first_difference
from cortexlab.scheduler.request import RequestState


def byte_fallback(size=256) -> PreTrainedTokenizerFast:
    """Every token is a byte, as Llama 2, Mistral and Gemma write what they have no word for."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "u", "content": "Hello there"}]


def saying(tokens):
    """A sampler that says these tokens."""
    left = iter(tokens)
    return lambda logprobs: mx.array([next(left)])


# --- text -----------------------------------------------------------------------------------------


def test_characters_of_several_bytes_are_told_once(tiny):
    tokenizer, tokens = byte_fallback(), list("日本語".encode())
    engine = cl.Engine(tiny, num_blocks=16, tokenizer=tokenizer)
    request = engine.submit([1, 2, 3], 9, sampling=saying(tokens))
    events = list(engine.run())
    assert request.text == tokenizer.decode(request.output_tokens) == "日本語"
    assert "".join(event.text for event in events) == "日本語"


def test_a_stop_string_cuts_at_its_first_character_and_ends_the_request_there(tiny):
    engine = cl.Engine(tiny, num_blocks=16, tokenizer=byte_fallback())
    request = engine.submit([1, 2], 9, sampling=saying("日本語".encode()), stop="本")
    list(engine.run())
    assert (request.text, request.finish_reason, len(request.output_tokens)) == ("日", "stop", 6)


def test_what_is_held_back_is_told_with_the_end(tiny):
    engine = cl.Engine(tiny, num_blocks=16, tokenizer=byte_fallback())
    request = engine.submit([1, 2], 20, sampling=saying(b"abcdefghijklmno"), stop=["defx"])
    events = engine.step() + engine.step()
    engine.cancel(request.id)
    events += engine.run()
    told = "".join(event.text or "" for event in events)
    assert told == request.text == byte_fallback().decode(request.output_tokens) == "ab"


@pytest.mark.parametrize("text", ["Hello", "<s>Hello"])
def test_a_prompt_as_text_becomes_the_tokens_of_mlx_lm(tiny, text):
    tokenizer = TokenizerWrapper(byte_level())
    engine = cl.Engine(tiny, num_blocks=64, tokenizer=tokenizer)
    request = engine.submit(text, 8, ignore_eos=True)
    list(engine.run())
    assert request.prompt.count(0) == 1, "BOS once"
    right = [each.token for each in stream_generate(tiny, tokenizer, text, max_tokens=8)]
    assert request.output_tokens[: len(right)] == right


def test_messages_go_through_the_chat_template_as_in_mlx_lm(tiny):
    tokenizer = TokenizerWrapper(byte_level(TEMPLATE))
    for given in (tokenizer, byte_level(TEMPLATE)):
        engine = cl.Engine(tiny, num_blocks=64, tokenizer=given)
        request = engine.submit(messages=MESSAGES, max_tokens=8)
        right = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
        assert list(request.prompt) == list(right)
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        assert engine.submit(text, 8).prompt == request.prompt


def test_what_a_tokenizer_returns_may_be_a_prompt(tiny):
    tokenizer, engine = byte_level(), cl.Engine(tiny, num_blocks=64)
    right = tuple(tokenizer.encode("Hello"))
    for given in (
        tokenizer("Hello"), tokenizer(["Hello"]), tokenizer("Hello", return_tensors="np"),
        tokenizer.encode("Hello"), tokenizer.encode("Hello", return_tensors="np"),
        tokenizer.backend_tokenizer.encode("Hello"),
    ):  # fmt: skip
        assert engine.submit(given, 2).prompt == right
    with pytest.raises(cl.BadInput, match="2 texts: submit one at a time"):
        engine.submit(tokenizer(["Hello", "there"]), 2)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"messages": MESSAGES}, "template"),
        ({"messages": MESSAGES, "prompt": [1]}, "either"),
        ({}, "either"),
        ({"messages": 3}, "messages"),
    ],
)
def test_bad_messages_are_refused_in_one_line(tiny, options, names):
    engine = cl.Engine(tiny, num_blocks=64, tokenizer=byte_level())
    with pytest.raises(cl.BadInput, match=names) as error:
        engine.submit(max_tokens=4, **options)
    assert "\n" not in str(error.value) and not engine.requests


# --- errors of one request ------------------------------------------------------------------------


class Broken(PreTrainedTokenizerFast):
    """Raises when it meets the token 7."""

    def decode(self, tokens, **options):
        if 7 in tokens:
            raise IndexError("no such\npiece")
        return super().decode(tokens, **options)


@pytest.mark.parametrize("pipeline", [False, True])
def test_what_raises_in_a_tokenizer_fails_its_request_alone(tiny, tiny_reference, pipeline):
    tokenizer = byte_level()
    broken = Broken(tokenizer_object=tokenizer.backend_tokenizer)
    engine = cl.Engine(tiny, num_blocks=64, tokenizer=broken, pipeline=pipeline)
    bad = engine.submit([4, 5], 12, sampling=saying([9, 7] * 9), ignore_eos=True)
    good = engine.submit([1, 2, 3], 6, ignore_eos=True)  # never 7
    events = list(engine.run())
    assert (bad.state, bad.finish_reason) == (RequestState.FAILED, "error")
    assert bad.output_tokens == [9, 7] and "\n" not in bad.error
    assert "its tokenizer raised IndexError" in bad.error
    assert tiny_reference.check(good)
    own = [event for event in events if event.request_id == bad.id]
    assert [event.token for event in own] == [9, 7, None]
    assert own[-1].finish_reason == "error" and engine.stats().used_blocks == 0


class Panic(BaseException):
    """What a library written in Rust raises where it panics."""

    __module__ = "pyo3_runtime"


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize("error", [Panic("index out\nof bounds"), Unspeakable()])
@pytest.mark.parametrize("where", ["tokenizer", "sampling", "stop", "on_token", "processor"])
def test_an_error_of_any_kind_fails_its_request_in_one_line(tiny, tiny_reference, where, error):
    def raising(*_):
        raise error

    tokenizer, options = None, {}
    if where == "tokenizer":
        tokenizer = byte_level()
        tokenizer.decode = raising
    else:
        options = {"logits_processors": [raising]} if where == "processor" else {where: raising}
    engine = cl.Engine(tiny, num_blocks=64, tokenizer=tokenizer)
    told = []
    bad = engine.submit([4, 5], 12, **{"on_token": told.append} | options)
    list(engine.run())
    assert bad.finish_reason == "error" and "\n" not in bad.error
    assert type(error).__name__ in bad.error
    assert where == "on_token" or told[-1].finish_reason == "error", "its consumer is told"
    if tokenizer is None:
        good = engine.submit([1, 2, 3], 12)
        list(engine.run())
        assert tiny_reference.check(good)


def test_a_message_shows_what_cannot_be_shown(tiny):
    engine = cl.Engine(tiny, num_blocks=16)
    for value in (10**5000, type("Mute", (), {"__repr__": lambda self: 1 / 0})()):
        with pytest.raises(cl.BadInput, match="max_tokens"):
            engine.submit([1], value)


@pytest.mark.parametrize("tokenizer", ["name", b"abc", 3])
def test_what_is_no_tokenizer_is_refused(tiny, tokenizer):
    with pytest.raises(cl.BadInput, match="tokenizer must encode and decode"):
        cl.Engine(tiny, num_blocks=16, tokenizer=tokenizer)


def test_tokens_that_a_tokenizer_lacks_do_not_end_the_others(tiny, tiny_reference):
    wrapper = TokenizerWrapper(byte_fallback(240), SPMStreamingDetokenizer)
    engine = cl.Engine(tiny, num_blocks=64, tokenizer=wrapper)
    bad = engine.submit([4, 5], 12, sampling=saying([250] * 12))
    good = engine.submit([1, 2, 3], 12)
    list(engine.run())
    assert tiny_reference.check(good)
    assert len(bad.output_tokens) == 12 and bad.text == wrapper.decode(bad.output_tokens)


def test_a_consumer_that_raises_at_the_last_token_fails_its_request(tiny):
    engine = cl.Engine(tiny, num_blocks=64)

    def consumer(event):
        if event.finish_reason:
            raise RuntimeError("full")

    request = engine.submit([1, 2], 3, on_token=consumer)
    events = list(engine.run())
    assert request.state is RequestState.FAILED and "token consumer raised" in request.error
    assert [event.finish_reason for event in events] == [None, None, None, "error"]


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_a_request_ends_when_its_time_is_over(tiny, tiny_reference, state):
    now = [0.0]
    engine = cl.Engine(tiny, num_blocks=64, max_batch_size=2, clock=lambda: now[0])
    kept = engine.submit([1, 2, 3], 10, timeout_s=100)
    other = engine.submit([4, 5, 6], 10) if state == "waiting" else None
    late = engine.submit([7, 8, 9], 10, timeout_s=2.5)
    events = []
    for _ in range(4):
        events += engine.step()
        now[0] += 1
    events += engine.run()
    assert (late.finish_reason, late.state) == ("timeout", RequestState.CANCELLED)
    assert late.finished_at == 3.0 and len(late.output_tokens) == (0 if other else 3)
    assert cl.TokenEvent(late.id, None, "timeout") in events
    assert tiny_reference.check(kept) and engine.stats().used_blocks == 0


# --- what is not finite ---------------------------------------------------------------------------


def test_a_model_whose_logits_are_not_finite_is_refused():
    model = cl.load_model("tiny")[0]
    down = model.model.layers[1].mlp.down_proj
    down.weight = down.weight * float("nan")
    with pytest.raises(cl.ModelError, match="not finite") as error:
        cl.Engine(model, num_blocks=64)
    assert "\n" not in str(error.value)


def model_with_nan(token: int):
    """A model that makes NaN of a token, which it hardly ever says."""
    model = cl.load_model("tiny")[0]
    for layer, row in ((model.model.embed_tokens, np.nan), (model.lm_head, 0)):
        weight = np.array(layer.weight)
        weight[token] = row
        layer.weight = mx.array(weight)
    return model


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("attention", ["auto", "windows", "views"])
@pytest.mark.parametrize("step_tokens", [512, 6])
def test_a_request_whose_logits_are_nan_fails_and_leaves_no_nan_to_others(
    attention, pipeline, step_tokens
):
    model = model_with_nan(250)

    def forced(tokens, logits):
        token = [1, 2, 250, 4, 5][len(tokens) - 3]
        return mx.where(mx.arange(logits.shape[-1]) == token, logits, -1e9)

    engine = cl.Engine(
        model, num_blocks=24, max_batch_size=6, attention=attention, pipeline=pipeline,
        prefix_caching=True, block_size=8, max_step_tokens=step_tokens,
    )  # fmt: skip
    prompts = [[*prompt, 3] for prompt in prompts_of([20, 7, 12, 30, 5], 250)]
    good = [engine.submit(prompt, 12) for prompt in prompts[:3]]
    engine.step()
    bad = [
        engine.submit([1, 2, 250, 3], 12),  # from its first token on
        engine.submit([5, 6, 7], 12, logits_processors=[forced]),  # in the midst
    ]
    good += [engine.submit(prompt, 12) for prompt in prompts[3:]]
    events = list(engine.run())
    again = [engine.submit(prompt, 12) for prompt in prompts]
    list(engine.run())
    for request in bad:
        assert request.finish_reason == "error" and "not finite" in request.error
        assert "\n" not in request.error
    assert [len(each.output_tokens) for each in bad] == [0, 3]
    for request in good + again:
        right = generate_step(mx.array(list(request.prompt)), model, max_tokens=12)
        assert request.output_tokens == [int(token) for token, _ in right]
    assert len([event for event in events if event.finish_reason]) == 7
    engine.cache.blocks.check()


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("steps", range(4))
def test_a_prefix_before_a_token_of_nan_stays_good_for_others(steps, pipeline):
    model, prefix = model_with_nan(250), list(range(1, 33))
    engine = cl.Engine(model, num_blocks=64, block_size=8, prefix_caching=True, pipeline=pipeline)
    bad = engine.submit([*prefix, 250, 3], 4)
    for _ in range(steps):
        engine.step()
    for prompt in ([*prefix, 5, 6], [*prefix, 7]):
        assert served(engine, prompt, 4).output_tokens == tokens_of(model, prompt, 4)
    assert bad.finish_reason == "error"


def test_a_processor_that_makes_nan_fails_its_request(tiny, tiny_reference):
    engine = cl.Engine(tiny, num_blocks=64)
    bad = engine.submit([1, 2], 5, logits_processors=[lambda _, logits: logits * float("nan")])
    good = engine.submit([1, 2, 3], 5)
    list(engine.run())
    assert "not finite" in bad.error and tiny_reference.check(good)


def test_weights_that_become_nan_fail_every_request_and_the_reference_says_so():
    model = cl.load_model("tiny")[0]
    engine = cl.Engine(model, num_blocks=64)
    requests = [engine.submit(prompt, 20) for prompt in prompts_of([9, 20], 256)]
    engine.step()
    down = model.model.layers[1].mlp.down_proj
    down.weight = down.weight * float("nan")
    list(engine.run())
    assert all("not finite" in request.error for request in requests)
    with pytest.raises(cl.ModelError, match="finite"):
        first_difference(model, [1, 2, 3], [0, 0])


# --- weights behind the engine's back -------------------------------------------------------------


def tokens_of(model, prompt, n=8):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=n)]


def served(engine, prompt, n=8):
    request = engine.submit(prompt, n)
    list(engine.run())
    return request


def test_new_weights_empty_the_prefix_cache():
    model, prompt = cl.load_model("tiny")[0], list(range(100))
    engine = cl.Engine(model, num_blocks=64, prefix_caching=True)
    assert served(engine, prompt).output_tokens == tokens_of(model, prompt)
    assert served(engine, prompt).cached_tokens > 0
    proj = model.model.layers[0].self_attn.k_proj
    proj.weight = proj.weight * 1.3
    mx.eval(model.parameters())
    request = served(engine, prompt)
    assert (request.cached_tokens, request.output_tokens) == (0, tokens_of(model, prompt))
    assert served(engine, prompt).cached_tokens > 0


def test_new_weights_are_noticed_however_full_the_batch_is():
    model, prompt = cl.load_model("tiny")[0], list(range(64))
    for options in (
        {"num_blocks": 20, "max_batch_size": 3, "watermark": 0.0},
        {"num_blocks": 64, "max_batch_size": 1},
    ):
        engine = cl.Engine(model, prefix_caching=True, block_size=8, **options)
        for i in range(2):
            engine.submit([i, 9], 40)
        engine.submit(prompt, 20)
        for _ in range(8):
            engine.step()
        later = engine.submit(prompt, 8)
        proj = model.model.layers[0].self_attn.k_proj
        proj.weight = proj.weight * 1.3
        mx.eval(model.parameters())
        list(engine.run())
        assert later.output_tokens == tokens_of(model, prompt)


def test_weights_written_in_place_are_noticed_by_forget_prefixes():
    model, prompt = cl.load_model("tiny")[0], list(range(100))
    engine = cl.Engine(model, num_blocks=64, prefix_caching=True)
    served(engine, prompt)
    running = engine.submit(prompt, 30)  # holds blocks of the old weights, and fills more
    engine.step()
    proj = model.model.layers[0].self_attn.k_proj
    proj.weight[...] = proj.weight * 1.3
    mx.eval(model.parameters())
    engine.forget_prefixes()
    for _ in range(2):
        request = engine.submit(prompt, 8)
        while request.finish_reason is None:
            engine.step()
        assert request.output_tokens == tokens_of(model, prompt)
    list(engine.run())
    longer = [*prompt, *running.output_tokens, 5]
    assert served(engine, longer).output_tokens == tokens_of(model, longer)
    engine.cache.blocks.check()
    engine.forget_prefixes()
    assert engine.stats()["cached_blocks"] == 0 == engine.stats().used_blocks


def test_what_old_weights_computed_is_not_shared_after_a_swap():
    model, prompt = cl.load_model("tiny")[0], list(range(60))
    engine = cl.Engine(
        model, block_size=8, num_blocks=30, prefix_caching=True, oom_policy="preempt",
        preemption="swap", watermark=0.0,
    )  # fmt: skip
    requests = [engine.submit([i, *prompt], 60) for i in range(3)]
    for _ in range(4):
        engine.step()
    proj = model.model.layers[0].self_attn.k_proj
    proj.weight[...] = proj.weight * 1.3
    mx.eval(proj.weight)
    engine.forget_prefixes()
    list(engine.run())
    assert engine.stats().num_preemptions
    for request in requests:
        again = list(request.prompt)
        assert served(engine, again).output_tokens == tokens_of(model, again)


@pytest.mark.parametrize("change", ["quantize", "head"])
def test_a_module_replaced_in_place_is_used(change):
    model = cl.load_model("tiny")[0]
    prompt = np.random.default_rng(3).integers(256, size=100).tolist()
    engine = cl.Engine(model, num_blocks=64)
    served(engine, prompt)
    if change == "quantize":
        nn.quantize(model, group_size=32, bits=4)
    else:
        model.lm_head = nn.Linear(64, 256, bias=False)
    mx.eval(model.parameters())
    assert served(engine, prompt).output_tokens == tokens_of(model, prompt)


def test_the_hit_rate_counts_a_prompt_at_its_first_admission_only(tiny):
    prompts = [np.random.default_rng(300 + i).integers(256, size=64) for i in range(8)]
    for blocks in (34, 200):
        engine = cl.Engine(
            tiny, num_blocks=blocks, max_batch_size=8, oom_policy="preempt", watermark=0.0,
            prefix_caching=True,
        )  # fmt: skip
        requests = [engine.submit(prompt, 200) for prompt in prompts]
        list(engine.run())
        stats = engine.stats()
        assert (stats.num_preemptions > 0) == (blocks == 34)
        assert stats["prefix_hit_rate"] == sum(each.cached_tokens for each in requests) == 0
