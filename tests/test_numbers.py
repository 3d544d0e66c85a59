"""Numbers from outside: NumPy's, MLX's and Python's count alike, and what is no number, or none to
compute with, is refused in one line.
"""

import json
import math
from dataclasses import fields
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from conftest import prompts_of

import cortexlab as cl
from cortexlab.allocators import STRATEGIES, Extent, make_allocator
from cortexlab.bench.mlx_lm import first_difference
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.engine.sampler import Chooser
from cortexlab.errors import a_number, at_least, seconds, share, yes_or_no
from cortexlab.host.models import load_model
from cortexlab.lab.theory import buddy_size
from cortexlab.options import COLDEST, EngineOptions, ReplayOptions, RequestOptions, SamplingParams
from cortexlab.replay import replay
from cortexlab.replay.step_time import StepTime
from cortexlab.workloads.synthetic import WorkItem, make_workload, pool_blocks, scale

WHOLE = [np.int8, np.uint16, np.int64, np.array, mx.array, int]
REAL = [np.float16, np.float32, np.float64, np.array, mx.array, Fraction, float]
NO_NUMBERS = [True, np.True_, np.array(True), mx.array(True), "4", None, [4], np.array([4]), 4j]
NOT_WHOLE = [*NO_NUMBERS, 4.0, np.float32(4), mx.array(4.0), mx.array([4])]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), mx.array(math.inf), 10**400]


def is_plain(value, kind: type) -> bool:
    """Whether ``value`` is of the very type that Python itself has."""
    return type(value) is kind


# --- the checks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_number_of_any_library_becomes_pythons_own(kind):
    assert at_least("n", kind(4), 1) == 4 and is_plain(at_least("n", kind(4), 1), int)
    with pytest.raises(cl.BadInput, match=r"^n must be a whole number of at least 5, not .*4"):
        at_least("n", kind(4), 5)
    with pytest.raises(cl.BadInput, match="of at most 3"):
        at_least("n", kind(4), 1, 3)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(cl.BadInput, match=r"^n must be a whole number of at least 1, not "):
        at_least("n", value, 1)


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("check", [a_number, share, seconds])
def test_a_real_number_of_any_library_becomes_pythons_own(kind, check):
    number = check("n", kind(0.5))
    assert number == 0.5 and is_plain(number, float)


@pytest.mark.parametrize("value", [*NO_NUMBERS, *NOT_FINITE], ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("check", [a_number, share, seconds])
def test_what_is_no_finite_number_is_refused(value, check):
    with pytest.raises(cl.BadInput, match=r"^n must be ") as refused:
        check("n", value)
    assert "\n" not in str(refused.value)


def test_an_array_of_several_rows_is_shown_in_one_line():
    with pytest.raises(cl.BadInput) as refused:
        at_least("n", np.zeros((3, 3)), 1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [np.bool_, np.array, mx.array, bool])
def test_yes_and_no_of_any_library_become_pythons_own(kind):
    assert yes_or_no("n", kind(True)) is True and yes_or_no("n", kind(False)) is False


@pytest.mark.parametrize("value", [1, np.int8(1), "yes", None, np.array([True])], ids=repr)
def test_a_number_is_no_yes(value):
    with pytest.raises(cl.BadInput, match=r"^n must be True or False"):
        yes_or_no("n", value)


# --- where numbers are taken ----------------------------------------------------------------------


def test_options_store_plain_numbers():
    given = {
        "num_blocks": np.int8(64),
        "block_size": np.int8(16),
        "max_batch_size": mx.array(8),
        "max_step_tokens": np.uint16(64),
        "max_seq_len": np.int16(512),
        "watermark": np.float64(0.1),
        "prefix_caching": np.True_,
    }
    for kind in (EngineOptions, ReplayOptions):
        options = kind(**given)
        stored = {name: getattr(options, name) for name in given}
        assert stored == {name: value.item() for name, value in given.items()}
        assert {type(value) for value in stored.values()} == {int, float, bool}


def test_sampling_stores_plain_numbers():
    params = SamplingParams.of(
        {
            "temperature": np.float32(0.5),
            "top_k": np.int32(5),
            "top_p": mx.array(0.5),
            "presence_penalty": np.float16(1),
            "logit_bias": {np.int64(7): np.float32(1.5), np.int8(8): -math.inf},
        }
    )
    assert params.logit_bias == {7: 1.5, 8: -math.inf}
    numbers = [getattr(params, each.name) for each in fields(params) if each.name != "logit_bias"]
    numbers += [*params.logit_bias, *params.logit_bias.values()]
    assert {type(number) for number in numbers} == {int, float, type(None)}


def test_a_request_in_numbers_of_numpy_is_the_request_in_pythons(tiny):
    prompt = prompts_of([20], 256)[0]
    plain = {"max_tokens": 4, "seed": 4, "priority": 1, "arrived_at": 0.5, "logprobs": 2}
    plain["sampling"] = {"temperature": 0.5, "top_k": 5, "logit_bias": {7: 1.5}}
    other = {
        "max_tokens": np.int64(4),
        "seed": np.int64(4),
        "priority": np.int64(1),
        "arrived_at": np.float32(0.5),
        "logprobs": np.int8(2),
        "sampling": {
            "temperature": np.float32(0.5),
            "top_k": np.int32(5),
            "logit_bias": {np.int64(7): np.float32(1.5)},
        },
    }
    engine = cl.Engine(tiny, num_blocks=np.int64(64), block_size=mx.array(16))
    asked = [engine.submit(prompt, **plain), engine.submit(np.array(prompt), **other)]
    list(engine.run())
    first, second = asked
    assert first.output_tokens == second.output_tokens and first.logprobs == second.logprobs
    assert is_plain(second.max_tokens, int) and is_plain(second.priority, int)
    assert is_plain(second.arrived_at, float) and second.finish_reason == "length"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_asked_for_in_numbers_of_numpy_are_plain_blocks(strategy):
    ours, same = make_allocator(strategy, np.int8(64)), make_allocator(strategy, 64)
    for ask, kind in ((ours, np.int8), (same, int)):
        ask.first = ask.allocate(kind(3))
        ask.grown = ask.extend(ask.first, kind(2)) or ask.first
    assert ours.grown == same.grown and ours.stats() == same.stats()
    assert all(is_plain(number, int) for extent in ours.grown for number in extent)
    assert is_plain(ours.num_blocks, int) and json.dumps(ours.stats())
    ours.free(tuple(Extent(*map(np.int64, extent)) for extent in ours.grown))
    ours.check()


@pytest.mark.parametrize("kind", [np.int64, mx.array])
def test_a_replay_in_numbers_of_other_libraries_is_the_same_replay(kind):
    items = make_workload("chat", kind(40), seed=kind(1), request_rate=np.float32(8))
    assert items == make_workload("chat", 40, seed=1, request_rate=8)
    options = {"num_blocks": 400, "block_sizes": [16], "max_batch_size": 8, "watermark": 0.25}
    others = {name: kind(value) for name, value in options.items() if isinstance(value, int)}
    others |= {"block_sizes": [kind(16)], "watermark": np.float32(0.25)}
    (one,), (other,) = replay(items, **options), replay(items, **others)
    timed = {"seconds": 0}
    assert one.row | timed == other.row | timed and json.dumps(other.row)


def test_an_item_of_a_workload_is_plain_and_has_tokens_and_a_time():
    item = WorkItem(np.float32(0.5), np.int64(10), mx.array(4), max_tokens=np.int8(9))
    assert item == WorkItem(0.5, 10, 4, max_tokens=9)
    assert [type(n) for n in (item.arrived_at, item.prompt_tokens, item.output_tokens)] == [
        float,
        int,
        int,
    ]
    for wrong in ((math.nan, 1, 1), (0.0, 0, 1), (0.0, 1, 2.5)):
        with pytest.raises(cl.BadInput):
            WorkItem(*wrong)


@pytest.mark.parametrize("value", [math.nan, 0, -1.0, True, "fast"])
def test_a_rate_a_shape_and_a_scale_must_be_positive_numbers(value):
    for option in ("request_rate", "burstiness", "scale_lengths"):
        with pytest.raises(cl.BadInput, match=option):
            make_workload("chat", 4, **{"request_rate": 1.0, option: value})


def test_sizes_of_a_pool_and_of_lengths_are_taken_from_numpy():
    assert pool_blocks(np.int64(7), None) == pool_blocks("7", None) == 7
    assert scale([WorkItem(0.0, 10, 4)], np.float32(2)) == [WorkItem(0.0, 20, 8, (), 1024)]
    assert buddy_size(np.int64(5)) == 8
    with pytest.raises(cl.BadInput, match="num_blocks must be a whole number of at least 1 or a"):
        pool_blocks(1.5, None)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, True, "1"])
def test_seconds_of_a_step_must_be_finite(wrong):
    with pytest.raises(cl.BadInput, match="step time: token_s"):
        StepTime(1.0, wrong, 0.0)


def test_a_step_time_is_fitted_to_finite_steps_and_stored_plain():
    step_time = StepTime(np.float32(0.5), np.int64(0), mx.array(0.25))
    assert json.loads(step_time.to_json()) == {"base_s": 0.5, "token_s": 0.0, "sequence_s": 0.25}
    with pytest.raises(cl.BadInput, match="finite"):
        StepTime.fit([(0.5, 1, 1), (math.nan, 2, 1)])


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens", [b"abc", bytearray(b"abc"), {1, 2}, frozenset([1, 2]), {1: 2}, memoryview(b"abc")]
)
@pytest.mark.parametrize("name", ["prompt", "stop_token_ids"])
def test_what_has_no_order_or_holds_bytes_is_no_sequence_of_token_ids(tiny, name, tokens):
    engine = cl.Engine(tiny, num_blocks=16)
    if name == "stop_token_ids" and isinstance(tokens, set | frozenset):
        # Their order says nothing, and mlx-lm's `tokenizer.eos_token_ids` is a set.
        assert engine.submit([1], 5, stop_token_ids=tokens).stop_token_ids == {1, 2}
        return
    with pytest.raises(cl.BadInput, match=f"^{name} must be a sequence of token ids") as refused:
        engine.submit(**{"prompt": [1], name: tokens})
    assert f"not a {type(tokens).__name__}: " in str(refused.value)


def test_a_string_names_no_stop_tokens(tiny):
    with pytest.raises(cl.BadInput, match=r"stop_token_ids must be a sequence .*, not a str: '12'"):
        cl.Engine(tiny, num_blocks=16).submit([1], stop_token_ids="12")


@pytest.mark.parametrize("tokens", [[np.True_], [True], np.array([True]), mx.array([1.0]), [1.0]])
def test_a_token_is_a_whole_number(tiny, tokens):
    with pytest.raises(cl.BadInput, match="prompt has token"):
        cl.Engine(tiny, num_blocks=16).submit(tokens)


def test_none_means_no_stop_and_no_processor(tiny, tiny_reference):
    engine = cl.Engine(tiny, num_blocks=64)
    request = engine.submit([1, 2, 3], 6, stop=None, stop_token_ids=None, logits_processors=None)
    list(engine.run())
    assert tiny_reference.check(request) and RequestOptions(stop=None) == RequestOptions()


# --- numbers to sample by -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {7: math.nan}},
        {"logit_bias": {7: math.inf}},
        {"logit_bias": {7: 1e39}},  # infinite in float32
        {"logit_bias": {7: True}},
        {"logit_bias": {True: 1.0}},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e39},
        {"temperature": -1e-9},
        {"temperature": mx.array(math.nan)},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-45},  # what is divided by it is infinite in float32
    ],
    ids=str,
)
def test_a_number_that_no_token_can_be_sampled_by_is_refused_in_one_line(sampling):
    (name,) = sampling
    with pytest.raises(cl.BadInput, match=name) as refused:
        SamplingParams(**sampling)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, np.float32(1e-40), COLDEST / 2])
def test_a_temperature_too_small_to_divide_by_is_greedy(tiny, tiny_reference, temperature):
    engine = cl.Engine(tiny, num_blocks=64)
    request = engine.submit([1, 2, 3], 8, sampling={"temperature": temperature}, seed=1)
    list(engine.run())
    assert tiny_reference.check(request) and request.chooser.state is None


@pytest.mark.parametrize("temperature", [COLDEST, 1e-6])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_cold_request_samples_the_largest_logit_in_any_type(temperature, dtype):
    logits = mx.zeros((1, 64)).astype(dtype)
    logits[0, 41] = 2.0
    chooser = Chooser({"temperature": temperature}, (), 3, None, 64)
    choice = chooser(None, logits, chooser.state)
    assert choice.token.tolist() == [41] and choice.finite.item()


def test_a_banned_token_is_never_said(tiny):
    engine = cl.Engine(tiny, num_blocks=64)
    best = engine.submit([1, 2, 3], 1)
    list(engine.run())
    (token,) = best.output_tokens
    other = engine.submit([1, 2, 3], 8, sampling={"logit_bias": {np.int64(token): -math.inf}})
    list(engine.run())
    assert len(other.output_tokens) == 8 and token not in other.output_tokens


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("sampling", [None, {"temperature": 0.8}])
@pytest.mark.parametrize(
    "changed, finite",
    [
        ({}, True),
        ({7: -math.inf}, True),
        ({7: math.nan}, False),
        ({7: math.inf}, False),
        ({7: math.nan, 8: -math.inf}, False),
        (dict.fromkeys(range(64), -math.inf), False),
        (dict.fromkeys(range(64), math.nan), False),
    ],
)
def test_a_choice_tells_whether_its_logits_were_finite(changed, finite, sampling, dtype):
    def spoil(tokens, logits):
        logits[0, mx.array(list(changed) or [0])] = mx.array(list(changed.values()) or [0.0])
        return logits

    logits = mx.random.normal((1, 64), key=mx.random.key(0)).astype(dtype)
    chooser = Chooser(sampling, [spoil], 1, None, 64)
    choice = chooser(mx.array([1]), logits, chooser.state)
    assert choice.finite.item() is finite
    assert any(array is choice.finite for array in choice.arrays()), "it lands with the token"


# --- a model that is broken -----------------------------------------------------------------------


def broken_model(number: float):
    """The tiny model with ``number`` in every weight of one layer."""
    model = load_model("tiny")[0]
    down = model.model.layers[1].mlp.down_proj
    down.weight = mx.full(down.weight.shape, number, down.weight.dtype)
    return model


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_tokens_of_a_broken_model_are_not_compared_with_its_own(number):
    with pytest.raises(cl.ModelError, match="NaN, infinite"):
        first_difference(broken_model(number), (1, 2, 3), [0, 0])


def test_a_bench_of_a_broken_model_fails():
    with pytest.raises(cl.ModelError):
        run_bench(broken_model(math.nan), [WorkItem(0.0, 5, 3)], ["paged", "mlx-lm"])


def test_the_setting_of_a_bench_is_plain():
    setting = Setting(np.int64(16), batch_size=np.int8(4), seed=mx.array(1), ignore_eos=np.False_)
    assert setting == Setting(16, batch_size=4, seed=1, ignore_eos=False)
    assert is_plain(setting.block_size, int) and setting.ignore_eos is False
    with pytest.raises(cl.BadInput, match="batch_size"):
        Setting(batch_size=0)
