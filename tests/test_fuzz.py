"""Inputs that once ended in an error of Python's own, and a short run of the fuzzer that found them
(`make fuzz` is the long one).
"""

import re
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from fuzz import attempt, results
from fuzz_calls import CACHE, ITEMS, cache_of, in_cache, in_pool
from fuzz_values import Mute

import cortexlab as cl
from cortexlab.allocators import strategy_of
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.cli.main import main
from cortexlab.engine.arena import LayerShape
from cortexlab.engine.kv_cache import KVCache
from cortexlab.host.models import load_model
from cortexlab.replay import Replay, StepTime, replay
from cortexlab.workloads.synthetic import WorkItem, shuffled_lengths, with_arrivals
from cortexlab.workloads.traces import load_trace

SHORT = 300  # inputs of the short run
FOUND = {  # input -> (call, its message)
    "no items": (partial(replay, []), "items must be a sequence of at least 1, not []"),
    "items of another kind": (partial(replay, ["a"]), "items must hold WorkItems only, not 'a'"),
    "one item": (partial(replay, ITEMS[0]), "items must be a sequence"),
    "no strategies": (partial(replay, ITEMS, ""), "strategies must be a sequence of at least 1"),
    "a name": (partial(replay, ITEMS, "paged"), "strategies must be a sequence"),
    "a number": (partial(replay, ITEMS, 3), "strategies must be a sequence"),
    "one size": (partial(replay, ITEMS, block_sizes=3), "block_sizes must be a sequence"),
    "an odd size": (
        partial(replay, ITEMS, block_sizes=[4, np.array("a")]),
        "block_size must be a whole number",
    ),
    "no function": (partial(replay, ITEMS, progress=3), "progress must be a function"),
    "an empty array": (
        partial(replay, ITEMS, num_blocks=np.array([])),
        "num_blocks must be unlimited",
    ),
    "digits": (partial(replay, ITEMS, num_blocks="9" * 5000), "num_blocks must be unlimited"),
    "no step time": (partial(replay, ITEMS, step_time=3), "step_time must be a StepTime, not 3"),
    "no items to run": (lambda: Replay(num_blocks=9).run(()), "items must be a sequence of"),
    "no sampler": (partial(Replay, num_blocks=9, on_sample=3), "on_sample must be a function"),
    "no ids": (partial(WorkItem, 0, 1, 1, prefix_ids=True), "prefix_ids must be a sequence"),
    "an id": (partial(WorkItem, 0, 1, 1, prefix_ids=(0, 2.5)), "prefix id must be a whole number"),
    "no lengths": (partial(shuffled_lengths, 3, 0), "items must be a sequence"),
    "no arrivals": (partial(with_arrivals, [], 1.0, 1.0, 0), "items must be a sequence"),
    "no steps": (partial(StepTime.fit, np.array([])), "steps must be a sequence of at least 1"),
    "a short step": (partial(StepTime.fit, [(1, 2)]), "a step must be (seconds, tokens"),
    "steps of text": (partial(StepTime.fit, ["abc"]), "a step must be a sequence, not 'abc'"),
    "no path": (partial(StepTime.load, Mute()), "step time must be a name or a path, not <Mute>"),
    "no trace": (partial(load_trace, np.array(3)), "trace must be a name or a path, not array(3)"),
    "no model": (partial(load_model, ["tiny"]), "model must be a name or a path, not ['tiny']"),
    "no seed": (partial(load_model, "tiny", seed="a"), "seed must be a whole number"),
    "a setting's pool": (partial(Setting, num_blocks="x"), "num_blocks must be a whole number"),
    "a setting's engine": (partial(Setting, engine=3), "engine must be a dict of options, not 3"),
    "a misspelt option": (partial(Setting, engine={"grow": 1}), "unknown engine option 'grow'"),
    "a wrong option": (partial(Setting, engine={"watermark": 3}), "watermark must be a share"),
    "no setting": (partial(run_bench, None, ITEMS, ["paged"], 3), "setting must be a Setting"),
    "no bench": (partial(run_bench, None, []), "items must be a sequence of at least 1"),
    "a host's pool": (
        partial(
            KVCache, [LayerShape(1, 2, 2)], strategy_of("paged"), 4, 4, swap_blocks=-1
        ),
        "swap_blocks must be a whole number of at least 0",
    ),
    "no type": (partial(cache_of, **CACHE | {"dtype": 3}), "dtype must be a type of MLX, not 3"),
    "no name": (partial(in_cache, "append_token", sequence=[]), "sequence must be a name, not []"),
    "no array": (
        partial(in_cache, "write", sequence="a", layer=0, keys="a", values="a", start=0),
        "keys must be an array of MLX, not 'a'",
    ),
    "no extents": (partial(in_pool, "runs", "free", extents=mx.zeros((0,))), "extents must be"),
    "a line break": (partial(cl.make_allocator, "a\nb", 3), "unknown placement"),
}  # fmt: skip


@pytest.mark.parametrize("found", FOUND)
def test_what_once_escaped_is_refused_in_one_line(found):
    call, message = FOUND[found]
    with pytest.raises(cl.BadInput, match=re.escape(message)) as error:
        call()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "line",
    [
        ["fetch-model", "a\nb"],
        ["traces", "--requests", "9" * 5000],
        ["report", "replay", "--out", "a\nb"],
        ["sweep", "x" * 300],
        ["sweep", "a\0b"],
        ["replay", "--out", "a\0b"],
    ],
)
def test_bad_usage_is_one_line_of_bounded_length(line, capsys):
    try:
        code = main(line)
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and len(err) < 1500


def test_a_short_run_of_the_fuzzer_finds_nothing():
    with results() as kept:
        wrong = [found for number in range(SHORT) if (found := attempt(1, number, kept))]
    told = "\n".join(f"{place}, {kind}: {words}\n{error}" for place, kind, words, error in wrong)
    assert not wrong, told
