"""Layers that keep a state in place of K and V: the tokens of mlx-lm in every setting, and states
that are copied when a batch changes, kept while a request lives, and gone with it.
"""

import interrupts
import mlx.core as mx
import pytest
from conftest import Reference, prompts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import VOCABULARY, tiny_model

import cortexlab as cl
from cortexlab.allocators import STRATEGIES
from cortexlab.bench.serve import run_bench
from cortexlab.bench.step_profile import record_step
from cortexlab.engine import mlx_lm_hook
from cortexlab.engine.arena import Arena
from cortexlab.engine.attention import RowRun
from cortexlab.engine.mlx_lm_hook import states_of
from cortexlab.engine.model_runner import Batching, ModelRunner
from cortexlab.engine.states import States
from cortexlab.workloads.synthetic import WorkItem

LENGTHS = (3, 60, 1, 31, 17)
TIGHT = {"num_blocks": 14, "block_size": 8, "watermark": 0.0, "oom_policy": "preempt"}
NAMES = ["lfm2", "qwen3_next", "mamba2", "falcon_h1", "kimi_linear"]  # the last one by one


class Hybrid:
    """A tiny model with states: its runner, its reference, and the bytes of a sequence's state."""

    def __init__(self, name: str):
        self.model = tiny_model(name)
        self.runner, self.reference = ModelRunner(self.model), Reference(self.model)
        caches = make_prompt_cache(self.model)
        self.model(mx.array([[1, 2, 3]]), cache=caches)
        self.state_bytes = sum(array.nbytes for array in states_of(caches))

    def engine(self, **options) -> cl.Engine:
        return cl.Engine(self.runner, **{"num_blocks": 64, "max_batch_size": 4} | options)

    def serve(self, lengths=LENGTHS, max_tokens=20, **options) -> cl.Engine:
        """An engine that has served prompts to the reference's tokens, and let go of all states."""
        engine = self.engine(**options)
        requests = [engine.submit(prompt, max_tokens) for prompt in prompts_of(lengths, VOCABULARY)]
        list(engine.run())
        self.check(engine, requests)
        return engine

    def check(self, engine, requests) -> None:
        exact = sum(self.reference.check_any(request, None) for request in requests)
        assert exact >= len(requests) - 1, "near ties end a comparison early"
        engine.cache.blocks.check()
        assert engine.stats().state_bytes == 0 == len(engine.cache.arena.states.arrays())


@pytest.fixture(scope="module", params=NAMES)
def hybrid(request):
    return Hybrid(request.param)


@pytest.fixture(scope="module")
def lfm2():
    return Hybrid("lfm2")


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["paged", "runs", "cortexstream"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_prompts_in_chunks_of_sixteen_give_the_tokens_of_mlx_lm(hybrid, strategy, pipeline):
    hybrid.serve(strategy=strategy, pipeline=pipeline, max_step_tokens=16)


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_preempted_request_computes_its_state_again(hybrid, pipeline):
    engine = hybrid.serve(pipeline=pipeline, max_step_tokens=16, **TIGHT)
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_request_keeps_its_state_while_its_k_and_v_are_swapped_out(hybrid, pipeline):
    computed = []
    engine = hybrid.serve(
        pipeline=pipeline,
        preemption="swap",
        on_step=lambda step: computed.append(step.num_prefill_tokens),
        **TIGHT,
    )
    assert engine.stats().num_preemptions > 0
    assert sum(computed) == sum(LENGTHS), "no prompt was computed twice"


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_request_may_be_cancelled_midway_and_the_others_go_on(hybrid, pipeline):
    engine = hybrid.engine(pipeline=pipeline, max_step_tokens=16)
    requests = [engine.submit(prompt, 20) for prompt in prompts_of(LENGTHS, VOCABULARY)]
    for victim in (requests[0], requests[1], requests[3]):
        for _ in range(3):
            engine.step()
        engine.cancel(victim.id)
    list(engine.run())
    assert [request.finish_reason for request in requests].count("cancelled") == 3
    hybrid.check(engine, requests)


def test_stop_tokens_sampling_and_logprobs_work_as_for_k_and_v(lfm2):
    prompt, other = prompts_of([20, 33], VOCABULARY)
    tokens = [token for token, _ in lfm2.reference.steps(prompt, 20)]
    engine = lfm2.engine()
    stopped = engine.submit(prompt, 20, stop_token_ids=[tokens[5]])
    drawn = engine.submit(other, 12, sampling={"temperature": 0.8}, seed=7, logprobs=2)
    list(engine.run())
    assert stopped.output_tokens == tokens[: tokens.index(tokens[5]) + 1]
    assert len(drawn.logprobs) == 12
    lfm2.reference.seeds[drawn] = 7
    lfm2.reference.check_any(drawn, 0.8)


@settings(max_examples=30, deadline=None)
@given(
    strategy=st.sampled_from(list(STRATEGIES)),
    pipeline=st.booleans(),
    preemption=st.sampled_from(["recompute", "swap"]),
    oom_policy=st.sampled_from(["wait", "preempt"]),
    batch_size=st.integers(1, 6),
    step_tokens=st.integers(6, 90),
    room=st.sampled_from([1.0, 1.5, 4.0]),  # size of the pool in longest requests
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
)
def test_every_setting_gives_the_tokens_of_mlx_lm(
    lfm2, strategy, pipeline, preemption, oom_policy, batch_size, step_tokens, room, lengths
):
    lfm2.serve(
        lengths,
        12,
        strategy=strategy,
        pipeline=pipeline,
        preemption=preemption,
        oom_policy=oom_policy,
        max_batch_size=batch_size,
        max_step_tokens=step_tokens,
        num_blocks=int(16 * room),
        block_size=8,
        max_seq_len=128,
        watermark=0.0,
    )


# --- copies and memory ----------------------------------------------------------------------------


def test_a_steady_batch_copies_no_state_and_a_change_copies_each_state_once(lfm2):
    engine, size = lfm2.engine(max_step_tokens=16), lfm2.state_bytes
    prompts = prompts_of((5, 9, 40), VOCABULARY)
    a, b = engine.submit(prompts[0], 60), engine.submit(prompts[1], 40)

    def copied_by(num_steps: int) -> int:
        before = engine.stats().state_copied_bytes
        for _ in range(num_steps):
            engine.step()
        return engine.stats().state_copied_bytes - before

    assert copied_by(1) == 0, "a state is made where it lies"
    assert (copied_by(1), copied_by(5)) == (2 * size, 0), "a and b join once"
    c = engine.submit(prompts[2], 30)
    assert copied_by(3) == 0, "a and b go on beside the prompt of c"
    assert engine.stats().state_bytes == 3 * size
    assert (copied_by(1), copied_by(5)) == (3 * size, 0), "c joins"
    engine.cancel(a.id)
    assert copied_by(5) == 0, "b and c lie side by side: a view"
    engine.submit(prompts[0], 3)
    assert copied_by(2) == 3 * size
    list(engine.run())
    lfm2.check(engine, [a, b, c])


def test_a_request_from_the_middle_of_a_batch_has_the_others_copied_once(lfm2):
    engine, size = lfm2.engine(), lfm2.state_bytes
    requests = [engine.submit(prompt, 30) for prompt in prompts_of((5, 9, 7), VOCABULARY)]
    for _ in range(4):
        engine.step()
    before = engine.stats().state_copied_bytes
    engine.cancel(requests[1].id)
    engine.step()
    assert engine.stats().state_copied_bytes - before == 2 * size
    list(engine.run())
    lfm2.check(engine, requests)


def test_the_first_token_of_a_prompt_leaves_the_decode_batch_together(lfm2):
    """A prompt of one token that stands ahead of the running requests."""
    engine = lfm2.engine()
    requests = [engine.submit(prompt, 20) for prompt in prompts_of((5, 9), VOCABULARY)]
    for _ in range(3):
        engine.step()
    before = engine.stats().state_copied_bytes
    requests.append(engine.submit([7], 8, priority=-1))
    engine.step()
    assert engine.stats().state_copied_bytes == before
    list(engine.run())
    lfm2.check(engine, requests)


def row(owner: str, start: int, num_rows: int = 1) -> RowRun:
    return RowRun(start, num_rows, [(0, start + num_rows)], owner)


def batch_of_three(size: int = 4) -> States:
    """States of a, b and c, stacked: arrays of 0, 1 and 2. Each has seen one token."""
    states = States()
    states.put([row(owner, 0) for owner in "abc"], [mx.ones((3, size)) * mx.arange(3)[:, None]])
    return states


@pytest.mark.parametrize(
    ("owners", "copied"),
    [("abc", 0), ("ab", 1), ("bc", 1), ("b", 2), ("ac", 3), ("cab", 3), ("acb", 3), ("cba", 3)],
)
def test_rows_of_a_stack_are_taken_in_any_order(owners, copied):
    """A run of neighbours is a view; those that stay behind are copied out of the stack."""
    states = batch_of_three()
    (taken,) = states.take([row(owner, 1) for owner in owners])
    assert taken[:, 0].tolist() == ["abc".index(owner) for owner in owners]
    assert states.copied_bytes == copied * 4 * 4
    behind = sorted(set("abc") - set(owners))
    for owner in behind:
        (own,) = states.take([row(owner, 1)])
        assert own.tolist() == [["abc".index(owner)] * 4]


def test_an_owner_that_began_anew_is_not_taken_from_its_old_stack():
    states = batch_of_three()
    states.put([row("b", 0, 5)], [mx.full((1, 4), 7.0)])
    (taken,) = states.take([row("a", 1), row("b", 5), row("c", 1)])
    assert taken[:, 0].tolist() == [0, 7, 2]


def test_a_state_that_has_seen_other_tokens_is_an_error_of_ours():
    with pytest.raises(AssertionError):
        batch_of_three().take([row("a", 2)])


@pytest.mark.parametrize("how", ["prompt", "left behind"])
def test_a_state_keeps_no_larger_array_alive(how):
    mx.synchronize()
    before, large = mx.get_active_memory(), 1_000_000
    if how == "prompt":
        states = States()
        states.put([row("a", 0, 1000)], [mx.zeros((1, 1000, large // 1000))[:, -3:]])
    else:
        states = batch_of_three(large)
        states.put([row("b", 1)], states.take([row("b", 1)]))
        mx.eval(states.arrays())
        states.put([row("c", 1)], [mx.zeros((1, 1))])
        states.put([row("b", 2)], [mx.zeros((1, 1))])
    mx.eval(states.arrays())
    assert mx.get_active_memory() - before < 1.1 * states.arrays()[0].nbytes + 100_000


def test_a_model_whose_sequences_run_one_by_one_copies_no_state(hybrid):
    engine = hybrid.serve()
    assert (engine.stats().state_copied_bytes == 0) == (hybrid.runner.way is Batching.ONE)


def test_a_model_of_k_and_v_reports_no_states(tiny):
    engine = cl.Engine(tiny, num_blocks=16)
    engine.submit([1, 2, 3], 8)
    for _ in range(3):
        engine.step()
    assert engine.stats().state_bytes == engine.stats().state_copied_bytes == 0


@pytest.mark.cpu  # a GPU's command buffer may hold an array after its evaluation
@pytest.mark.parametrize("pipeline", [False, True])
def test_memory_stays_flat_while_a_batch_decodes(hybrid, pipeline):
    engine = hybrid.engine(pipeline=pipeline)
    for prompt in prompts_of((5, 60, 9), VOCABULARY):
        engine.submit(prompt, 150)
    held = []
    for _ in range(120):
        engine.step()
        held.append(mx.get_active_memory())
    more = max(held[60:]) - max(held[20:60])
    assert more < 20 * 3 * hybrid.state_bytes, "60 steps, each of whose states was dropped"
    assert engine.stats().state_bytes == 3 * hybrid.state_bytes


def test_a_model_without_any_k_and_v_has_an_empty_arena():
    mamba = Hybrid("mamba")
    engine = mamba.serve(preemption="swap", **TIGHT)
    assert engine.stats().arena_bytes == 0 and engine.stats().num_preemptions > 0


# --- exceptions and refusals ----------------------------------------------------------------------


def test_a_step_that_raises_has_all_states_computed_again(lfm2, monkeypatch):
    engine = lfm2.engine()
    requests = [engine.submit(prompt, 10) for prompt in prompts_of((30, 7, 50), VOCABULARY)]
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(mlx_lm_hook.LayerCache, "attend", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    list(engine.run())
    lfm2.check(engine, requests)


@pytest.mark.parametrize("mode", ["plain", "swap", "preempt", "pipelined"])
def test_an_exception_at_any_line_leaves_no_wrong_token_and_no_state(lfm2, monkeypatch, mode):
    monkeypatch.setattr(
        interrupts, "prompts_of", lambda lengths, _: prompts_of(lengths, VOCABULARY)
    )
    monkeypatch.setitem(interrupts.MODES, "preempt", interrupts.TIGHT)
    monkeypatch.setitem(interrupts.MODES, "pipelined", {"num_blocks": 64, "pipeline": True})
    right, at = interrupts.right_tokens(lfm2.runner, mode, lfm2.model), 1
    while interrupts.interrupted_run(lfm2.runner, mode, right, at):
        at += 211
    assert at > 5000, "a run has that many lines"


def test_a_state_that_is_spoilt_once_is_computed_again(lfm2):
    engine = lfm2.engine()
    good, bad = (engine.submit(prompt, 12) for prompt in prompts_of((20, 9), VOCABULARY))
    states = engine.cache.arena.states
    for _ in range(3):
        engine.step()
    (stack,) = set(states._stacks.values())
    stack.arrays[0] = stack.arrays[0].at[1].add(mx.nan)
    list(engine.run())
    assert bad.finish_reason == "length" and bad.is_careful and not good.is_careful
    lfm2.check(engine, [good, bad])


def test_prefix_caching_is_refused_in_one_line(lfm2):
    with pytest.raises(cl.BadInput, match=r"prefix_caching .* layer \d+ uses ArraysCache") as error:
        lfm2.engine(prefix_caching=True)
    assert "\n" not in str(error.value)


def test_measurements_that_need_k_and_v_or_a_step_of_one_call_are_refused(lfm2):
    with pytest.raises(cl.ModelError, match="compares memory for K and V"):
        run_bench(tiny_model("mamba"), [WorkItem(0.0, 4, 4)])
    with pytest.raises(cl.ModelError, match="this model takes decode rows at once"):
        record_step(lfm2.runner, [row("a", 0, 3)], Arena(lfm2.runner.layers, 8))


def test_prefix_caching_works_for_lists_of_k_and_v():
    model = tiny_model("deepseek_v32")
    engine = cl.Engine(model, num_blocks=64, block_size=4, prefix_caching=True)
    (prompt,), reference = prompts_of([30], VOCABULARY), Reference(model)
    for _ in range(2):
        request = engine.submit(prompt, 8)
        list(engine.run())
        reference.check(request)
    assert request.cached_tokens == 29, "all but the last"
