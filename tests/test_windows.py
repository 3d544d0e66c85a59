"""Layers with a sliding window give back what it has passed: mlx-lm's tokens in every setting, and
few blocks.
"""

import mlx.core as mx
import pytest
from conftest import Reference, address, prompts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from mlx_lm.models import gemma3_text
from tiny_models import VOCABULARY, tiny_model

import cortexlab as cl
from cortexlab.allocators import STRATEGIES, Paged
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.bench.summary import engine_step
from cortexlab.engine.model_runner import ModelRunner
from cortexlab.workloads.synthetic import WorkItem

NAMES = ["gemma3_text", "gpt_oss", "olmo3", "llama (sliding window)", "recurrent_gemma"]
LENGTHS = (3, 60, 1, 31, 17)
TIGHT = {"block_size": 4, "watermark": 0.0, "oom_policy": "preempt"}


class Windowed:
    def __init__(self, model):
        self.model, self.runner = model, ModelRunner(model)
        self.reference = Reference(model)

    def serve(self, prompts, max_tokens=24, **options) -> tuple[cl.Engine, list]:
        """An engine that has served prompts to the reference's tokens, and what it holds after."""
        options = {"num_blocks": 200, "block_size": 4, "max_batch_size": 4} | options
        engine = cl.Engine(self.runner, max_step_tokens=16, **options)
        requests = [engine.submit(prompt, max_tokens) for prompt in prompts]
        list(engine.run())
        exact = sum(self.reference.check_any(request, None) for request in requests)
        assert exact >= len(requests) - 1, "near ties end a comparison early"
        engine.cache.blocks.check()
        assert engine.stats().held_bytes == 0 == engine.cache.blocks.num_held
        return engine, requests


@pytest.fixture(scope="module", params=NAMES)
def windowed(request):
    return Windowed(tiny_model(request.param))


def gemma3(num_layers: int, every: int) -> Windowed:
    """A model of which each ``every``-th layer sees all tokens, the others a window of 32."""
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text", hidden_size=64, num_hidden_layers=num_layers,
        intermediate_size=96, num_attention_heads=4, head_dim=16, num_key_value_heads=2,
        vocab_size=VOCABULARY, sliding_window=32, sliding_window_pattern=every,
    )  # fmt: skip
    model, keys = gemma3_text.Model(args), iter(mx.random.split(mx.random.key(0), 1000))
    model.update(
        tree_map(lambda p: 0.2 * mx.random.normal(p.shape, key=next(keys)), model.parameters())
    )
    return Windowed(model)


@pytest.fixture(scope="module")
def five_to_one():
    return gemma3(6, 6)


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_are_mlx_lms_under_every_strategy(windowed, strategy):
    blocks = 1024 if "buddy" in strategy else 200
    windowed.serve(prompts_of(LENGTHS, VOCABULARY), num_blocks=blocks, strategy=strategy)


@pytest.mark.parametrize("strategy", ["paged", "runs", "best_fit"])
@pytest.mark.parametrize("swap", [0, 400])
def test_tokens_are_mlx_lms_after_preemption(windowed, strategy, swap):
    prompts, has_full = prompts_of(LENGTHS, VOCABULARY), None in windowed.runner.windows
    engine, _ = windowed.serve(
        prompts, strategy=strategy, num_blocks=40 if has_full else 12, swap_blocks=swap or None,
        preemption="swap" if swap else "recompute", **TIGHT,
    )  # fmt: skip
    assert engine.stats().num_preemptions > 0, "the test needs a pool that is too small"


@pytest.mark.parametrize("windowed", NAMES[:-1], indirect=True)  # the last one has states
@pytest.mark.parametrize("strategy", ["paged", "runs", "best_fit", "buddy", "cortexstream"])
def test_tokens_are_mlx_lms_where_prompts_begin_alike(windowed, strategy):
    (first,) = prompts_of([60], VOCABULARY)
    prompts = [first, first[:48], [*first[:40], 5, 6, 7, 8, 9], first]
    engine, requests = windowed.serve(
        prompts, num_blocks=256, strategy=strategy, prefix_caching=True
    )
    assert [request.cached_tokens for request in requests[1:]] == [47, 40, 59]
    later = engine.submit([*first, *requests[0].output_tokens[:-1], 1, 2], 8)
    list(engine.run())
    # A ring that has turned is not cached; nor can a reservation or a buddy be parted.
    assert later.cached_tokens >= (76 if strategy in ("paged", "runs") else 60)
    windowed.reference.check_any(later, None)


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("attention", ["auto", "views", "windows", "gather"])
def test_arrays_that_groups_share_are_written_in_place(five_to_one, attention, pipeline):
    engine = cl.Engine(
        five_to_one.runner, num_blocks=300, block_size=4, attention=attention, pipeline=pipeline,
        max_step_tokens=16,
    )  # fmt: skip
    requests = [engine.submit(prompt, 24) for prompt in prompts_of(LENGTHS, VOCABULARY)]
    places = [address(array) for array in engine.cache.arena.arrays()]
    while engine.requests:
        engine.step()
        if not pipeline:
            assert places == [address(array) for array in engine.cache.arena.arrays()]
    assert sum(five_to_one.reference.check_any(request, None) for request in requests) >= 4


@settings(max_examples=30, deadline=None)
@given(
    strategy=st.sampled_from(["paged", "runs", "best_fit", "segregated", "cortexstream", "static"]),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    num_blocks=st.integers(60, 200),
    max_batch_size=st.integers(1, 4),
    max_step_tokens=st.integers(4, 24),
    oom_policy=st.sampled_from(["wait", "preempt"]),
    prefix_caching=st.booleans(),
    pipeline=st.booleans(),
)
def test_every_setting_gives_mlx_lms_tokens(five_to_one, lengths, **options):
    if options["strategy"] == "static":
        options["prefix_caching"] = False
    engine = cl.Engine(
        five_to_one.runner, block_size=4, max_seq_len=80, preemption="recompute", **options
    )
    requests = []
    for prompt in prompts_of(lengths, VOCABULARY):
        try:
            requests.append(engine.submit(prompt, 12))
        except cl.BadInput as error:
            assert "blocks, which can never fit the pool of" in str(error)
    for _ in range(3000):
        engine.step()
    assert not engine.requests, "requests wait for each other for ever"
    for request in requests:
        assert request.finish_reason == "length"
        five_to_one.reference.check_any(request, None)
    engine.cache.blocks.check()


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["paged", "runs", "best_fit", "segregated"])
def test_five_local_layers_to_one_hold_78_blocks_of_1000_tokens(five_to_one, strategy):
    steps, chunk = [], 64
    engine = cl.Engine(
        five_to_one.runner, num_blocks=300, strategy=strategy, max_step_tokens=chunk,
        on_step=lambda step: steps.append((step.num_prefill_tokens, step.pool["used_blocks"])),
    )  # fmt: skip
    (prompt,) = prompts_of([1000], VOCABULARY)
    request = engine.submit(prompt, 9)
    list(engine.run())
    assert max(used for _, used in steps) <= 63 + 5 * (-(-(31 + chunk) // 16) + 1)
    assert {used for prefilled, used in steps if not prefilled} == {78}
    five_to_one.reference.check_any(request, None)
    copied = engine.stats().copied_bytes
    slot = engine.cache.arena.slot_bytes
    assert copied == 0 if strategy in ("paged", "runs") else copied <= 5 * (31 + 16) * slot


def test_twenty_requests_that_share_1000_tokens_hit_62_blocks(five_to_one):
    (prompt,) = prompts_of([1000], VOCABULARY)
    engine = cl.Engine(
        five_to_one.runner, num_blocks=600, prefix_caching=True, max_step_tokens=256,
        max_batch_size=20,
    )  # fmt: skip
    requests = [engine.submit([*prompt, n], 4) for n in range(20)]
    list(engine.run())
    assert [request.cached_tokens for request in requests] == [0] + 19 * [62 * 16]
    for request in requests[:3]:
        five_to_one.reference.check_any(request, None)


class Keeps(Paged):
    """An allocator whose fronts never come back, which its protocol allows."""

    def release_front(self, extents, num_blocks):
        return extents


def test_a_lone_prompt_that_cannot_go_on_fails_and_does_not_come_back_for_ever(five_to_one):
    engine = cl.Engine(
        five_to_one.runner, num_blocks=63 + 5 * 7, strategy=Keeps, max_step_tokens=64
    )  # fmt: skip
    stuck, fine = (engine.submit(prompt, 4) for prompt in prompts_of([1000, 40], VOCABULARY))
    list(engine.run())
    assert stuck.finish_reason == "error" and "out of KV memory" in stuck.error
    assert stuck.num_preemptions == 0 and fine.finish_reason == "length"
    five_to_one.reference.check_any(fine, None)


def test_strategies_whose_blocks_hold_other_layers_are_benched_apart(five_to_one):
    items, setting = [WorkItem(0.0, 8, 4)], Setting(prefix_caching=True)
    with pytest.raises(cl.BadInput, match=r"only paged give back .* bench them apart"):
        run_bench(five_to_one.model, items, ["paged", "best_fit"], setting)
    for strategies in (["paged", "runs"], ["best_fit", "cortexstream"]):
        assert run_bench(five_to_one.model, items, strategies, setting).held


def test_statistics_count_each_group_by_its_layers(five_to_one):
    engine = cl.Engine(five_to_one.runner, num_blocks=100, max_step_tokens=16)
    engine.submit(prompts_of([60], VOCABULARY)[0], 8)
    for _ in range(4):
        engine.step()
    stats = engine.stats()
    assert stats.num_sequences == 1 and stats.used_blocks == 4 + 5 * 3
    held = stats.used_blocks * 16 * engine.cache.arena.slot_bytes
    assert stats.held_bytes == held and stats.arena_bytes == 100 * 16 * 2 * 2 * 16 * 4
    # All 60 tokens in the full group; in a window of 32, at position 48, blocks from token 16 on.
    assert stats.token_share == (60 + 5 * 44) / (19 * 16)
    assert stats.token_share + stats.empty_share == 1


def test_an_empty_layer_of_a_padded_group_is_internal():
    model, records = gemma3(5, 2), []  # layers 1 and 3 see all: a group of 2, and one of 3
    engine = cl.Engine(model.runner, num_blocks=16, on_step=records.append)
    request = engine.submit(prompts_of([16], VOCABULARY)[0], 3, request_id="r0")
    engine.step()
    stats = engine.stats()
    assert stats.used_blocks == 2
    assert stats.token_share == pytest.approx(5 / 6)
    assert stats.empty_share == pytest.approx(1 / 6)
    list(engine.run())
    model.reference.check_any(request, None)
    step = engine_step(records[0], 0.0, 16, {request.id: [18]})
    slots = step["token_slots"], step["reserved_slots"], step["internal_slots"]
    assert slots == pytest.approx((32 * 5 / 6, 0, 32 / 6))
