"""The watermark: blocks an admission leaves free for those that run to grow into, and what free
blocks that are left so count as.
"""

import json
from math import nan

import pytest

from cortexlab import BadInput, Request
from cortexlab.allocators import STRATEGIES, strategy_of
from cortexlab.cli import main as command_line
from cortexlab.replay.simulation import Replay
from cortexlab.replay.step_time import StepTime
from cortexlab.scheduler.block_manager import BlockManager
from cortexlab.scheduler.scheduler import OOM_POLICIES, Scheduler
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
    """Who runs after a step, and the blocks free but not usable in it."""
    for each in requests:
        of.add(each)
    plan = of.schedule(0.0)
    of.blocks.check()
    for chunk in plan.chunks:  # as an engine does behind a step
        samples, chunk.request.num_computed = chunk.samples, chunk.stop
        chunk.request.output_tokens += [0] * samples
    assert plan.unusable_blocks in (0, of.blocks.free_blocks)
    return "".join(each.id for each in of.running), plan.unusable_blocks


# --- who is admitted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "running"), [(4, "ab"), (5, "ab"), (6, "a"), (7, "a"), (8, "a")]
)
def test_two_of_ten_blocks_stay_free_for_who_runs(prompt, running):
    """a a a . . . . . . .   of the seven that are free b may take five."""
    assert admitted(scheduler(), request("a", 3), request("b", prompt))[0] == running


@pytest.mark.parametrize("prompt", [8, 9, 10])
def test_the_first_of_an_empty_batch_may_take_them_all(prompt):
    """Nobody is there who could grow into what is kept."""
    for watermark in (0.2, 0.99):
        assert admitted(scheduler(watermark=watermark), request("a", prompt, 1)) == ("a", 0)


def test_who_waits_for_the_watermark_is_admitted_when_it_is_alone():
    of, a, b = scheduler(), request("a", 3), request("b", 9, 2)
    assert admitted(of, a, b)[0] == "a"
    of.remove(a)
    assert admitted(of)[0] == "b"


def test_growing_takes_what_admission_kept():
    """a a a b b b b b . .   a and b take the last two, and there is nobody left behind."""
    of = scheduler()
    assert admitted(of, request("a", 3), request("b", 5))[0] == "ab"
    assert admitted(of) == ("ab", 0)
    assert (of.blocks.free_blocks, of.stalled) == (0, {})


def test_the_kept_blocks_are_the_whole_ones_of_the_share():
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
def test_nothing_is_kept_where_nobody_grows_or_nobody_waits(strategy, growth, oom_policy):
    """Seven blocks are free and b wants six. What is reserved never grows; where memory that is out
    means failure, waiting does too.
    """
    keeps = growth != "reserve" and oom_policy != "fail"
    of = scheduler(strategy=strategy, growth=growth, oom_policy=oom_policy)
    assert admitted(of, request("a", 3, 1), request("b", 6, 1))[0] == ("a" if keeps else "ab")


def test_the_queue_keeps_its_order_when_the_head_is_refused():
    """A later one that would leave enough free does not pass it."""
    assert admitted(scheduler(), request("a", 3), request("b", 6), request("c", 1))[0] == "a"


def test_one_that_was_sent_back_comes_back_by_the_same_rule():
    """a a a b b b . . . .   both go back with a token more: a is alone and takes four, b wants four
    of the six free.
    """
    for watermark, running in [(0.2, "ab"), (0.3, "a")]:
        of = scheduler(watermark=watermark, oom_policy="preempt")
        for each in (request("a", 3), request("b", 3)):
            of.add(each)
        assert of.blocks.growth == "chain" and admitted(of)[0] == "ab"
        of.restart_all()
        assert admitted(of)[0] == running


# --- free, but kept: the external share -----------------------------------------------------------


@pytest.mark.parametrize(("prompt", "unusable"), [(5, 0), (6, 7), (7, 7), (8, 0)])
def test_what_the_watermark_refuses_is_free_and_not_usable(prompt, unusable):
    """b wants 6 of 7 free blocks and waits: all seven are external. One that wants 8 waits because
    memory is out.
    """
    assert admitted(scheduler(), request("a", 3), request("b", prompt))[1] == unusable


@pytest.mark.parametrize("watermark", [0, 0.2])
def test_a_full_batch_refuses_nobody(watermark):
    assert admitted(
        scheduler(watermark=watermark, max_batch_size=1), request("a", 3), request("b", 6)
    ) == ("a", 0)


@pytest.mark.parametrize("watermark", [0, 0.2])
def test_a_spent_step_refuses_nobody(watermark):
    """a's prompt is all that four tokens a step can do; in the step behind it there is room for b,
    and b is refused.
    """
    of = scheduler(watermark=watermark, max_step_tokens=4)
    assert admitted(of, request("a", 4), request("b", 5)) == ("a", 0)
    assert admitted(of) == (("ab", 0) if not watermark else ("a", 5))


def test_while_others_stand_still_free_blocks_count_as_refused():
    """a a b b . c c . .   a may not move, and b is in its way: it stands still, nobody is let in,
    and three blocks are free.
    """
    of = scheduler(9, watermark=0, strategy="cortexstream", growth="chain")
    a, b, x, c = (request(name, n, 6) for name, n in (("a", 2), ("b", 2), ("x", 1), ("c", 2)))
    assert admitted(of, a, b, x, c)[0] == "abxc"
    of.remove(x)
    for each in (b, c):  # still at the end of their prompts: only a asks for a block
        each.output_tokens.clear()
        each.num_computed = 1
    running, unusable = admitted(of, request("d", 2, 1))
    assert list(of.stalled) == [a]
    assert (running, unusable) == ("abc", 3)


# --- shared blocks that somebody holds need no free one -------------------------------------------

SHARED = tuple(range(7))  # prefix ids: seven blocks of two tokens


def sharing(num_blocks: int, watermark: float) -> Scheduler:
    """a runs and holds the seven blocks; its one answer block is not yet needed."""
    of = scheduler(num_blocks, watermark, block_size=2, prefix_caching=True)
    assert admitted(of, request("a", 14, 2, SHARED))[0] == "a"
    assert of.blocks.num_held == 7
    of.running[
        0
    ].output_tokens.clear()  # still at its prompt's last token, so that it does not grow
    of.running[0].num_computed = 13
    return of


@pytest.mark.parametrize(
    ("num_blocks", "watermark", "running", "unusable"),
    [
        (13, 0.0, "ab", 0),
        (
            13,
            0.2,
            "ab",
            0,
        ),  # six free, one wanted, two kept; without sharing it would be eight wanted
        (13, 0.4, "ab", 0),  # 1 + 5
        (13, 0.5, "a", 6),  # 1 + 6
        (15, 0.2, "ab", 0),
        (15, 0.5, "ab", 0),  # 1 + 7 of 8
        (15, 0.6, "a", 8),  # 1 + 9
        (8, 0.0, "ab", 0),
        (8, 0.2, "a", 1),  # the one block it needs is there, and kept
        (7, 0.0, "a", 0),  # and here it is not
    ],
)
def test_a_prompt_that_is_mostly_held_needs_only_the_rest(num_blocks, watermark, running, unusable):
    assert admitted(sharing(num_blocks, watermark), request("b", 16, 2, (*SHARED, 9))) == (
        running,
        unusable,
    )


def test_a_prompt_held_whole_needs_no_block_at_all():
    assert admitted(sharing(7, 0.0), request("b", 14, 1, SHARED)) == ("ab", 0)
    assert admitted(sharing(7, 0.2), request("b", 14, 1, SHARED)) == ("a", 0), (
        "X is all free slots, and there are none"
    )


def test_cached_blocks_that_nobody_holds_are_free_and_wanted():
    """a's seven are idle, x holds five of fifteen: ten are free; b takes seven idle ones and one
    more, and three are kept.
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


def test_a_replay_admits_who_shares():
    """The same two in a replay: b has not waited for a's end."""
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
    """Two requests of four slots that grow to eight, both there at once."""
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


def test_a_replay_in_which_the_second_waits_for_the_firsts_end():
    """With none kept both are admitted, and b gives way when the ten are full; with three kept it
    waits, and nothing is done twice.
    """
    for watermark, times, num_preemptions in [
        (0.0, [(10, 50), (10, 80)], 1),
        (0.3, [(10, 50), (60, 100)], 0),
    ]:
        done = replayed(watermark)
        assert [(r.first_ns, r.finished_ns) for r in done.requests] == times
        assert done.row["num_preemptions"] == num_preemptions


def test_the_share_that_the_watermark_leaves_empty_is_external():
    """a holds 4 5 6 7 8 of ten; the others are external while b's four are no more than they are:
    in the first three steps.
    """
    shares = replayed(0.3).row
    external = [6 / 10, 5 / 10, 4 / 10, 0, 0, 0, 0, 0, 0, 0]
    assert shares["external_share"] == pytest.approx(sum(external) / 10)
    assert sum(
        shares[f"{name}_share"] for name in ("token", "reserved", "internal", "external")
    ) == pytest.approx(1)
    assert replayed(0.0).row["external_share"] == 0


def test_a_sample_shows_what_the_row_sums():
    (first, *_) = replayed(0.3).samples
    assert (first["external_slots"], first["token_slots"], first["num_waiting"]) == (6, 4, 1)


# --- values that make no sense, and the command line ----------------------------------------------

BAD = [-0.1, 1, 1.0, 2, nan, float("inf"), "x", "0.1", None, True]


@pytest.mark.parametrize("watermark", BAD, ids=repr)
def test_a_watermark_that_is_no_share_is_named(watermark):
    with pytest.raises(BadInput, match=f"watermark.*{watermark!r}"):
        scheduler(watermark=watermark)
    with pytest.raises(BadInput, match=f"watermark.*{watermark!r}"):
        Replay(num_blocks=8, watermark=watermark)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """`cortexlab replay` here: ``(exit code, stdout, stderr)``."""
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


def test_the_command_line_takes_a_watermark(run, tmp_path):
    """The more is kept, the more is empty while somebody waits, and the fewer give way."""
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
def test_the_command_line_names_a_watermark_that_is_none(watermark, run, tmp_path):
    code, stdout, stderr = run(f"--watermark={watermark}")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "watermark" in stderr and watermark in stderr
    assert not (tmp_path / "results").exists()
