"""The watermark: blocks that an admission leaves free for the growth of running requests, and the
external share of these blocks.

A drawing shows one character a block: its request, or a dot for a free block.
"""

import json
from math import nan

import pytest

from cortexlab import BadInput, Request
from cortexlab.allocators import STRATEGIES, strategy_of
from cortexlab.cli import main as command_line
from cortexlab.options import OOM_POLICIES
from cortexlab.replay import Replay
from cortexlab.replay.step_time import StepTime
from cortexlab.scheduler.block_manager import BlockManager
from cortexlab.scheduler.scheduler import Scheduler
from cortexlab.workloads.synthetic import WorkItem

NS = 1e-9


def scheduler(
    num_blocks: int = 10,
    watermark: float = 0.2,
    strategy: str = "paged",
    *,
    block_size: int = 1,
    growth: str | None = None,
    prefix_caching: bool = False,
    **options,
) -> Scheduler:
    blocks = BlockManager(
        strategy_of(strategy, growth), num_blocks, block_size, prefix_caching=prefix_caching
    )
    return Scheduler(
        blocks, watermark=watermark, **{"max_batch_size": 4, "max_step_tokens": 64} | options
    )


def request(
    name: str, prompt: int, max_tokens: int = 20, prefix_ids: tuple[int, ...] = ()
) -> Request:
    return Request(name, tuple(range(prompt)), max_tokens, prefix_ids=prefix_ids)


def admitted(of: Scheduler, *requests: Request) -> tuple[str, int]:
    """Schedule one step; returns the ids of the running requests and the unusable blocks."""
    for each in requests:
        of.add(each)
    plan = of.schedule(0.0)
    of.blocks.check()
    for chunk in plan.chunks:  # tokens are counted as an engine does after a step
        chunk.request.output_tokens += [0] * chunk.samples
    assert plan.unusable_blocks in (0, of.blocks.free_blocks)
    return "".join(each.id for each in of.running), plan.unusable_blocks


# --- admission ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "running"), [(4, "ab"), (5, "ab"), (6, "a"), (7, "a"), (8, "a")]
)
def test_an_admission_leaves_two_of_ten_blocks_free_for_running_requests(prompt, running):
    """a a a . . . . . . .   b may take five of the seven free blocks."""
    assert admitted(scheduler(), request("a", 3), request("b", prompt))[0] == running


@pytest.mark.parametrize("prompt", [8, 9, 10])
def test_the_first_request_of_an_empty_batch_may_take_all_blocks(prompt):
    """No running request could grow into kept blocks."""
    for watermark in (0.2, 0.99):
        assert admitted(scheduler(watermark=watermark), request("a", prompt, 1)) == ("a", 0)


def test_a_request_that_the_watermark_holds_back_is_admitted_into_an_empty_batch():
    of, a, b = scheduler(), request("a", 3), request("b", 9, 2)
    assert admitted(of, a, b)[0] == "a"
    of.remove(a)
    assert admitted(of)[0] == "b"


def test_growing_requests_take_the_kept_blocks():
    """a a a b b b b b . .   a and b take the last two blocks, and no request is stalled."""
    of = scheduler()
    assert admitted(of, request("a", 3), request("b", 5))[0] == "ab"
    assert admitted(of) == ("ab", 0)
    assert (of.blocks.free_blocks, of.stalled) == (0, {})


def test_the_kept_blocks_are_the_watermarks_share_rounded_down():
    for num_blocks, watermark, kept in [
        (10, 0.2, 2),
        (14, 0.2, 2),
        (15, 0.2, 3),
        (4, 0.2, 0),
        (10, 0, 0),
        (10, 0.99, 9),
        (100, 0.02, 2),
    ]:
        assert scheduler(num_blocks, watermark).kept_blocks == kept
        free = num_blocks - 1
        room = request("b", free - kept, 1) if free > kept else None
        assert (
            room is None
            or admitted(scheduler(num_blocks, watermark), request("a", 1), room)[0] == "ab"
        )
        if kept:
            assert (
                admitted(
                    scheduler(num_blocks, watermark),
                    request("a", 1),
                    request("b", free - kept + 1, 1),
                )[0]
                == "a"
            )


@pytest.mark.parametrize("oom_policy", OOM_POLICIES)
@pytest.mark.parametrize("growth", ["reserve", "relocate", "chain"])
@pytest.mark.parametrize(
    "strategy", sorted(set(STRATEGIES) - {"static", "cortexstream_buddy", "buddy"})
)
def test_no_blocks_are_kept_under_reserve_or_the_policy_fail(strategy, growth, oom_policy):
    """a a a . . . . . . .   b wants six of the seven free blocks. A reserved request never grows,
    and under "fail" a request that must wait would fail.
    """
    keeps = growth != "reserve" and oom_policy != "fail"
    of = scheduler(strategy=strategy, growth=growth, oom_policy=oom_policy)
    assert admitted(of, request("a", 3, 1), request("b", 6, 1))[0] == ("a" if keeps else "ab")


def test_the_queue_keeps_its_order_when_the_head_is_refused():
    """c would leave enough blocks free, but does not overtake b."""
    assert admitted(scheduler(), request("a", 3), request("b", 6), request("c", 1))[0] == "a"


def test_a_preempted_request_is_admitted_again_by_the_rule_of_the_watermark():
    """a a a b b b . . . .   both are preempted with one more token: a takes four blocks of the
    empty pool, then b wants four of the six free blocks.
    """
    for watermark, running in [(0.2, "ab"), (0.3, "a")]:
        of = scheduler(watermark=watermark, oom_policy="preempt")
        both = request("a", 3), request("b", 3)
        for each in both:
            of.add(each)
        assert of.blocks.growth == "chain" and admitted(of)[0] == "ab"
        of.blocks.clear()
        of.restart_all(both, now=0.0)
        assert admitted(of)[0] == running


# --- the external share of kept blocks ------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "unusable"), [(5, 0), (6, 7), (7, 7), (8, 0)])
def test_all_free_blocks_are_unusable_while_the_watermark_refuses_the_head(prompt, unusable):
    """a a a . . . . . . .   b wants six of seven free blocks and waits: all seven are external. If
    b wants eight, memory is short and none is external.
    """
    assert admitted(scheduler(), request("a", 3), request("b", prompt))[1] == unusable


@pytest.mark.parametrize("watermark", [0, 0.2])
def test_a_full_batch_leaves_no_block_unusable(watermark):
    assert admitted(
        scheduler(watermark=watermark, max_batch_size=1), request("a", 3), request("b", 6)
    ) == ("a", 0)


@pytest.mark.parametrize("watermark", [0, 0.2])
def test_a_step_without_tokens_left_leaves_no_block_unusable(watermark):
    """a's prompt takes all four tokens of the first step; the second step has tokens for b, which
    the watermark refuses.
    """
    of = scheduler(watermark=watermark, max_step_tokens=4)
    assert admitted(of, request("a", 4), request("b", 5)) == ("a", 0)
    assert admitted(of) == (("ab", 0) if not watermark else ("a", 5))


def test_all_free_blocks_are_unusable_while_a_request_is_stalled():
    """a a b b . c c . .   b lies behind a, which may not move: a is stalled, no request is
    admitted, and three blocks are free.
    """
    of = scheduler(9, watermark=0, strategy="cortexstream", growth="chain")
    a, b, x, c = (request(name, n, 6) for name, n in (("a", 2), ("b", 2), ("x", 1), ("c", 2)))
    assert admitted(of, a, b, x, c)[0] == "abxc"
    of.remove(x)
    for each in (b, c):  # reset to the end of their prompts, so that only a asks for a block
        each.output_tokens.clear()
        each.table.num_tokens = 1
    running, unusable = admitted(of, request("d", 2, 1))
    assert list(of.stalled) == [a]
    assert (running, unusable) == ("abc", 3)


# --- shared blocks --------------------------------------------------------------------------------

SHARED = tuple(range(7))  # prefix ids of seven blocks of two tokens


def sharing(num_blocks: int, watermark: float) -> Scheduler:
    """A scheduler in which a runs and holds the seven shared blocks, none yet for its answer."""
    of = scheduler(num_blocks, watermark, block_size=2, prefix_caching=True)
    assert admitted(of, request("a", 14, 2, SHARED))[0] == "a"
    assert of.blocks.num_held == 7
    of.running[0].output_tokens.clear()  # a stays at its prompt's last token and does not grow
    of.running[0].table.num_tokens = 13
    return of


@pytest.mark.parametrize(
    ("num_blocks", "watermark", "running", "unusable"),
    [
        (13, 0.0, "ab", 0),
        (13, 0.2, "ab", 0),  # b wants 1 of 6 free blocks, 2 are kept; without sharing b wants 8
        (13, 0.4, "ab", 0),  # 1 wanted and 5 kept, 6 free
        (13, 0.5, "a", 6),  # 1 wanted and 6 kept, 6 free
        (15, 0.2, "ab", 0),
        (15, 0.5, "ab", 0),  # 1 wanted and 7 kept, 8 free
        (15, 0.6, "a", 8),  # 1 wanted and 9 kept, 8 free
        (8, 0.0, "ab", 0),
        (8, 0.2, "a", 1),  # the one free block that b wants is kept
        (7, 0.0, "a", 0),  # no block is free
    ],
)
def test_a_prompt_whose_blocks_are_mostly_held_needs_only_the_rest(
    num_blocks, watermark, running, unusable
):
    assert admitted(sharing(num_blocks, watermark), request("b", 16, 2, (*SHARED, 9))) == (
        running,
        unusable,
    )


def test_a_prompt_whose_blocks_are_all_held_needs_no_free_block():
    assert admitted(sharing(7, 0.0), request("b", 14, 1, SHARED)) == ("ab", 0)
    assert admitted(sharing(7, 0.2), request("b", 14, 1, SHARED)) == ("a", 0), (
        "no block is free, so none is unusable"
    )


def test_idle_cached_blocks_count_as_free_and_as_wanted():
    """x holds five of fifteen blocks, and ten are free, a's seven idle ones among them. b wants the
    seven and one more; a watermark of 0.2 keeps three.
    """
    for watermark, expected in ((0.0, ("xb", 0)), (0.13, ("xb", 0)), (0.2, ("x", 10))):
        of, a = (
            scheduler(15, watermark, block_size=2, prefix_caching=True),
            request("a", 14, 1, SHARED),
        )
        assert admitted(of, a)[0] == "a"
        of.remove(a)
        assert (of.blocks.free_blocks, of.blocks.prefix.num_idle) == (15, 7)
        assert admitted(of, request("x", 9, 2, (20, 21, 22, 23, 24)))[0] == "x"
        assert admitted(of, request("b", 16, 2, (*SHARED, 9))) == expected


def test_a_replay_admits_a_request_by_the_blocks_it_does_not_share():
    """Request b shares seven blocks with a, and does not wait for a's end."""
    items = [WorkItem(0.0, 14, 9, SHARED, 2), WorkItem(15 * NS, 16, 1, (*SHARED, 9), 2)]
    for num_blocks in (13, 15):
        done = Replay(
            "paged",
            num_blocks=num_blocks,
            block_size=2,
            watermark=0.2,
            prefix_caching=True,
            step_time=StepTime(10 * NS, 0, 0),
        )
        done.run(items)
        assert [each.first_ns for each in done.requests] == [10, 30]
        assert done.row["external_share"] == 0


# --- the replay -----------------------------------------------------------------------------------


def replayed(watermark: float, num_blocks: int = 10, **options) -> Replay:
    """Replay of two requests that arrive together and grow from four slots to eight."""
    done = Replay(
        "paged",
        num_blocks=num_blocks,
        block_size=1,
        watermark=watermark,
        step_time=StepTime(10 * NS, 0, 0),
        **options,
    )
    done.run([WorkItem(0.0, 4, 5), WorkItem(0.0, 4, 5)])
    return done


def test_a_watermark_makes_a_request_wait_instead_of_being_preempted():
    """Without kept blocks a and b are admitted, and b is preempted when the ten blocks are full.
    With three kept blocks b waits for a's end, and no token is computed twice.
    """
    for watermark, times, num_preemptions in [
        (0.0, [(10, 50), (10, 80)], 1),
        (0.3, [(10, 50), (60, 100)], 0),
    ]:
        done = replayed(watermark)
        assert [(r.first_ns, r.finished_ns) for r in done.requests] == times
        assert done.row["num_preemptions"] == num_preemptions


def test_blocks_that_the_watermark_keeps_from_the_head_are_external():
    """a holds 4 5 6 7 8 of ten blocks. The free blocks are external while b's four would fit: in
    the first three steps.
    """
    shares = replayed(0.3).row
    external = [6 / 10, 5 / 10, 4 / 10, 0, 0, 0, 0, 0, 0, 0]
    assert shares["external_share"] == pytest.approx(sum(external) / 10)
    assert sum(
        shares[f"{name}_share"] for name in ("token", "reserved", "internal", "external")
    ) == pytest.approx(1)
    assert replayed(0.0).row["external_share"] == 0


def test_a_sample_shows_external_slots_token_slots_and_the_queue():
    (first, *_) = replayed(0.3).samples
    assert (first["external_slots"], first["token_slots"], first["num_waiting"]) == (6, 4, 1)


# --- wrong values, and the command line -----------------------------------------------------------

BAD = [-0.1, 1, 1.0, 2, nan, float("inf"), "x", "0.1", None, True]


@pytest.mark.parametrize("watermark", BAD, ids=repr)
def test_a_watermark_that_is_no_share_is_refused_by_name_and_value(watermark):
    with pytest.raises(BadInput, match=f"watermark.*{watermark!r}"):
        scheduler(watermark=watermark)
    with pytest.raises(BadInput, match=f"watermark.*{watermark!r}"):
        Replay(num_blocks=8, watermark=watermark)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Function that runs `cortexlab replay`; returns ``(exit code, stdout, stderr)``."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        try:
            code = command_line.main(
                [
                    "replay",
                    "--requests",
                    "80",
                    "--workload",
                    "heavy-tail",
                    "--request-rate",
                    "40",
                    *words,
                ]
            )
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_a_higher_watermark_leaves_more_empty_and_preempts_less(run, tmp_path):
    """`cortexlab replay --watermark` with three values, and the default of 0.02."""
    rows = {}
    for watermark in ("0", "0.02", "0.3"):
        code, stdout, _ = run(
            "--num-blocks", "40%", "--watermark", watermark, "--json", "--name", f"w{watermark}"
        )
        (rows[watermark],) = json.loads(stdout)["rows"]
        assert code == 0
        saved = json.loads((tmp_path / "results" / f"w{watermark}" / "run.json").read_text())
        assert saved["arguments"]["watermark"] == float(watermark)
    assert rows["0"]["external_share"] < rows["0.3"]["external_share"]
    assert rows["0"]["empty_share"] < rows["0.3"]["empty_share"]
    assert rows["0"]["num_preemptions"] >= rows["0.3"]["num_preemptions"]
    (default,) = json.loads(run("--num-blocks", "40%", "--json")[1])["rows"]
    assert {**default, "seconds": 0} == {**rows["0.02"], "seconds": 0}


@pytest.mark.parametrize("watermark", ["-0.1", "1", "nan", "x", "inf", ""])
def test_the_command_line_refuses_a_wrong_watermark_in_one_line(watermark, run, tmp_path):
    code, stdout, stderr = run(f"--watermark={watermark}")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "watermark" in stderr and watermark in stderr
    assert not (tmp_path / "results").exists()
