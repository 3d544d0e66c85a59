"""The cost of bookkeeping, measured by `cortexlab allocbench`. Tests assert the meaning of the
figures, never a time.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import weakref
from functools import partial

import pytest

from cortexlab.allocators import STRATEGIES
from cortexlab.allocators.contiguous import Segregated
from cortexlab.bench import allocator_cost
from cortexlab.cli import allocbench
from cortexlab.errors import BadInput

ROW = ["strategy", "num_blocks", "occupancy", "request_blocks", "operation", "median_us", "p99_us"]
SMALL = ["--num-blocks", "256,512", "--occupancy", "0,0.5", "--request-blocks", "4"]

PEER = """
class Block:
    def __init__(self, block_id):
        self.block_id = block_id

class PagedCacheManager:
    def __init__(self, block_size=64, max_blocks=1000, enable_caching=True):
        self.queue = [Block(i) for i in range(1, max_blocks)]  # block 0 is never handed out
        self.blocks = {block.block_id: block for block in self.queue}

    @property
    def free_blocks(self):
        return len(self.queue)

    def get_new_blocks(self, num_blocks):
        if num_blocks > len(self.queue):
            raise ValueError("Cannot allocate")
        taken, self.queue = self.queue[:num_blocks], self.queue[num_blocks:]
        return taken

    def allocate_block(self):
        return self.queue.pop(0) if self.queue else None

    def free_block_batch(self, blocks):
        self.queue += blocks

    def free_block(self, block_id):
        self.queue.append(self.blocks[block_id])

    def get_stats(self):
        return {"free_blocks": len(self.queue)}
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short batches of 20 microseconds, and no peer unless a test installs one."""
    monkeypatch.setattr(allocator_cost, "BATCH_NS", 20_000)
    monkeypatch.setattr(allocbench, "find_peer", lambda: None)


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """An importable package ``vllm_mlx`` with `PEER` as its paged cache."""
    package = tmp_path / "vllm_mlx"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the package itself must not run')")
    (package / "paged_cache.py").write_text(PEER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(allocbench, "find_peer", allocator_cost.find_peer)
    yield
    sys.modules.pop("vllm_mlx_paged_cache", None)


@pytest.fixture
def run(capsys, monkeypatch):
    """The command, which must succeed: its text. ``resolve``: name with a colon -> factory."""

    def run(*words, resolve=None) -> str:
        parser = argparse.ArgumentParser()
        allocbench.add_arguments(parser)
        if resolve is not None:
            named = allocbench.strategy_named
            ours = lambda name, also: resolve(name) if ":" in name else named(name, also)  # noqa: E731
            monkeypatch.setattr(allocbench, "strategy_named", ours)
        code, text = allocbench.run(parser.parse_args(words))
        printed = capsys.readouterr()
        assert (code, printed.out, printed.err) == (0, "", "")
        return text + "\n"

    return run


KEYS = ("strategy", "num_blocks", "occupancy", "operation")


def medians(document: dict) -> dict:
    return {tuple(row[key] for key in KEYS): row["median_us"] for row in document["rows"]}


# --- a good run -----------------------------------------------------------------------------------


def test_the_document_has_a_row_for_every_strategy_pool_occupancy_and_operation(run):
    printed = run("--json", *SMALL)
    document = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert printed.count("\n") == 1
    assert set(document) == {"environment", "rows", "ratios", "pools"}
    environment, rows = document["environment"], document["rows"]
    assert environment["python_version"] and environment["vllm_mlx_version"] is None
    assert [list(row) for row in rows] == [ROW] * len(rows)
    num_rows = len(STRATEGIES) * 2 * 2 * 3
    assert len(medians(document)) == len(rows) == len(document["ratios"]) == num_rows
    assert {row["request_blocks"] for row in rows} == {4}


def test_measured_figures_are_positive_and_figures_that_do_not_apply_null(run):
    document = json.loads(run("--json", *SMALL, "--strategies", "static,segregated,paged"))
    for row in document["rows"]:
        never = (row["strategy"], row["operation"]) == ("static", "extend")
        assert (row["median_us"] is None) == never, row
        assert row["p99_us"] is None or row["p99_us"] >= row["median_us"] > 0
    for pool in document["pools"]:
        assert abs(pool["used_share"] - pool["occupancy"]) < 0.15
        assert (pool["turnover_median_us"] is None) == (pool["occupancy"] == 0)


def test_ratios_compare_each_row_with_the_smallest_pool_and_with_the_peer_in_an_equal_pool(
    run, peer
):
    document = json.loads(run("--json", *SMALL, "--strategies", "paged,vllm-mlx,vllm-mlx-block"))
    at = medians(document)
    for ratio in document["ratios"]:
        name, num_blocks, *rest = (ratio[key] for key in KEYS)
        others = {f"to_{each}": (each, num_blocks) for each in allocator_cost.PEERS}
        for key, other in ({"to_smallest_pool": (name, 256)} | others).items():
            expected = at[name, num_blocks, *rest] / at[*other, *rest]
            assert ratio[key] == pytest.approx(expected)


def test_the_printed_tables_fit_80_columns_and_each_has_every_strategy(run, peer):
    lines = run(*SMALL).splitlines()
    assert max(map(len, lines)) <= 80
    for name in (*STRATEGIES, *allocator_cost.PEERS):
        assert sum(bool(re.match(f"{name} +[-0-9]", line)) for line in lines) == 4
    assert "of the time of vllm-mlx" in " ".join(lines)


def test_without_the_peer_installed_ratios_to_the_peer_are_null(run):
    document = json.loads(run("--json", *SMALL, "--strategies", "paged"))
    assert {row["strategy"] for row in document["rows"]} == {"paged"}
    assert all(ratio["to_vllm-mlx"] is None for ratio in document["ratios"])
    assert "vllm-mlx is not installed" in run(*SMALL, "--strategies", "paged")


def test_a_users_own_strategy_is_measured_beside_ours(run):
    class Mine(Segregated):
        pass

    words = [*SMALL, "--strategies", "mine:Mine,paged"]
    document = json.loads(run("--json", *words, resolve={"mine:Mine": Mine}.__getitem__))
    assert list(dict.fromkeys(row["strategy"] for row in document["rows"])) == ["Mine", "paged"]


@pytest.mark.parametrize("module", ["bench.allocator_cost", "cli.allocbench", "bench.environment"])
def test_a_module_of_allocbench_loads_no_mlx(module):
    code = f"import sys; import cortexlab.{module}; assert not sys.modules.keys() & "
    code += "{'mlx', 'mlx.core'}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- the pools ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_measurement_frees_every_block_that_it_takes(strategy):
    pool = allocator_cost.pool_of(strategy, 512)
    pool.fill(8)
    pool.thin(0.5)
    assert pool.make_room(8)
    allocator_cost._figures(pool, 8)
    pool.check()
    num_live = sum(pool.size(held) for held, _ in pool.live)
    assert pool.num_blocks - pool.free_blocks() == pool.used == num_live
    pool.thin(0)
    assert (pool.free_blocks(), pool.live) == (512, [])


@pytest.mark.parametrize("way", allocator_cost.PEERS)
def test_a_pool_of_the_peer_has_all_its_blocks_and_gets_them_back(way, peer):
    pool = allocator_cost.peer_pool(allocator_cost.find_peer(), way, 256)
    assert pool.free_blocks() == 256
    pool.fill(8)
    pool.thin(0.5)
    figures = {*allocator_cost.OPERATIONS, allocator_cost.TURNOVER}
    assert set(allocator_cost._figures(pool, 8)) == figures
    assert pool.free_blocks() == 256 - pool.used >= 128
    pool.thin(0)
    assert pool.free_blocks() == 256


def test_churn_makes_holes_and_keeps_the_sizes_of_all_requests_live_or_waiting():
    pool = allocator_cost.pool_of("segregated", 4096)
    pool.fill(16)
    pool.thin(0.5)
    asked = sorted(size for _, size in pool.live)
    pool.churn()
    assert sorted([*(size for _, size in pool.live), *pool.waiting]) == asked
    assert pool.stats()["num_holes"] > 10
    assert 0.4 < pool.used / 4096 <= 0.5


def test_make_room_frees_allocations_until_the_request_fits():
    pool = allocator_cost.pool_of("best_fit", 256)
    pool.fill(4)
    assert pool.make_room(64) and pool.allocate(64) is not None
    static = allocator_cost.pool_of("static", 256)
    assert not static.make_room(64), "a region of 32 blocks holds 64"


def test_figures_at_an_occupancy_out_of_reach_are_null_beside_the_share_reached():
    class Half(Segregated):  # hands out at most half of its blocks
        def allocate(self, num_blocks):
            if self.stats()["used_blocks"] + num_blocks > self.num_blocks // 2:
                return None
            return super().allocate(num_blocks)

    half = {"half": partial(allocator_cost.pool_of, Half)}
    rows, states = allocator_cost.measure(half, [256], [0, 0.9], 4)
    measured = [row for row in rows if row["operation"] == "allocate+free"]
    nulls = {(row["occupancy"], row["median_us"] is None) for row in measured}
    assert nulls == {(0, False), (0.9, True)}
    assert [0 <= state["used_share"] <= 0.5 for state in states] == [True, True]


def test_the_garbage_collector_is_on_again_after_a_strategy_has_raised(run):
    def broken(num_blocks):
        raise RuntimeError("no")

    with pytest.raises(BadInput):
        run("--strategies", "mine:broken", resolve=lambda name: broken)
    assert gc.isenabled()


def test_a_pool_that_holds_itself_is_gone_once_it_has_been_measured():
    class Circular(Segregated):
        def __init__(self, num_blocks):
            super().__init__(num_blocks)
            self.itself = self
            made.append(weakref.ref(self))

    made = []
    gc.disable()  # so that only the collection after the measurement can free a cycle
    try:
        allocator_cost.measure({"it": partial(allocator_cost.pool_of, Circular)}, [64], [0.5], 4)
        assert [each() for each in made] == [None]
    finally:
        gc.enable()


# --- faulty strategies ----------------------------------------------------------------------------


class Leaky(Segregated):
    """Keeps the blocks of the seventh `free`."""

    count = 0

    def free(self, extents):
        self.count += 1
        if self.count != 7:
            super().free(extents)


class Raising(Segregated):
    def free(self, extents):
        raise RuntimeError("lost\nfor words")


class Short(Segregated):
    def allocate(self, num_blocks):
        return ()


class Crooked(Segregated):
    def check(self):
        raise AssertionError("the books do not agree")


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        (Leaky, "loses blocks"),
        (Raising, "RuntimeError.*words"),
        (Short, "0 blocks"),
        (Crooked, "AssertionError.*books"),
    ],
)
def test_a_strategy_that_loses_blocks_or_raises_is_refused_in_one_line(strategy, named, run):
    with pytest.raises(BadInput, match=f"'{strategy.__name__}'.*{named}") as raised:
        run(*SMALL, "--strategies", "mine:it", resolve=lambda name: strategy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--strategies fancy", "'fancy'.*buddy.*vllm-mlx"),
        ("--strategies paged,", "''"),
        ("--strategies paged,paged", "'paged'.*twice"),
        ("--strategies mlx-lm", "'mlx-lm'"),
        ("--strategies vllm-mlx", "'vllm-mlx'.*not installed"),
        ("--num-blocks many", "num_blocks.*many"),
        ("--num-blocks 256,", "num_blocks.*256,"),
        ("--num-blocks 0", "num_blocks.*at least 1.*0"),
        ("--num-blocks 1000000000000", "num_blocks.*at most"),
        ("--occupancy 1", "occupancy.*1"),
        ("--occupancy -0.1", "occupancy.*-0.1"),
        ("--occupancy nan", "occupancy.*nan"),
        ("--occupancy 90%", "occupancy.*90%"),
        ("--request-blocks 0", "request_blocks.*0"),
        ("--request-blocks 300 --num-blocks 256", "request_blocks.*256.*300"),
        ("--seed -1", "seed.*-1"),
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_the_value(words, named, run):
    with pytest.raises(BadInput, match=named) as raised:
        run(*words.split())
    assert "\n" not in str(raised.value)
