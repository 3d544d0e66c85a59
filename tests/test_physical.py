"""CortexStream's physical API: stories, what it refuses, and eight threads at once."""

import random
import sys
from threading import Thread

import pytest

from cortexlab import CortexLabError, Extent
from cortexlab.allocators import STRATEGIES
from cortexlab.lab.cortexstream import KVBlockAllocator, KVHandle

every_strategy = pytest.mark.parametrize("strategy", [*STRATEGIES, "first_fit"])


def test_a_handle_names_the_blocks_it_holds_until_it_is_freed():
    pool = KVBlockAllocator(2048)
    handle = pool.allocate(32)
    assert (handle.start_block_index, handle.num_blocks, handle.extents) == (
        0,
        32,
        (Extent(0, 32),),
    ) and handle.is_valid()
    assert (pool.total_blocks(), pool.used_blocks(), pool.free_blocks()) == (2048, 32, 2016)
    pool.free(handle)
    assert (pool.used_blocks(), pool.free_blocks(), pool.largest_free_run()) == (0, 2048, 2048)


def test_no_room_is_none_and_takes_nothing():
    pool = KVBlockAllocator(8)
    a, _, c = pool.allocate(3), pool.allocate(2), pool.allocate(3)
    assert pool.allocate(1) is None
    pool.free(a)
    pool.free(c)  # . . . b b . . .
    assert pool.allocate(4) is None
    assert pool.stats() == {
        "free_blocks": 6,
        "used_blocks": 2,
        "largest_free_run": 3,
        "num_holes": 2,
        "external_fragmentation": 0.5,
    }
    assert pool.fragmentation() == 0.5


def test_a_handle_of_a_scattering_strategy_has_several_extents():
    pool = KVBlockAllocator(6, strategy="paged")
    singles = [pool.allocate(1) for _ in range(6)]
    for handle in singles[::2]:
        pool.free(handle)
    handle = pool.allocate(3)
    assert handle.num_blocks == 3 and {extent.start for extent in handle.extents} == {0, 2, 4}
    pool.check()


def test_the_block_map_shows_a_letter_a_handle():
    pool = KVBlockAllocator(12)
    a, _ = pool.allocate(3), pool.allocate(6)
    assert (
        pool.dump_block_map(width=8)
        == "KVBlockAllocator: 12 blocks, 9 used, 3 free, fragmentation 0.00\n0 aaabbbbb\n8 b..."
    )
    pool.free(a)
    assert pool.dump_block_map(width=6).splitlines()[1:] == ["0 ...aaa", "6 aaa..."]


@every_strategy
def test_all_but_a_live_handle_of_this_allocator_is_refused_by_name_and_changes_nothing(strategy):
    pool, other = KVBlockAllocator(64, strategy), KVBlockAllocator(64, strategy)
    live, gone, foreign = pool.allocate(4), pool.allocate(4), other.allocate(4)
    pool.free(gone)
    for wrong, reason in [
        (gone, "freed already"),
        (foreign, "another allocator"),  # equal numbers
        (KVHandle(live.start_block_index, live.num_blocks), "overlaps KVHandle"),
        (KVHandle(live.start_block_index, 1), "overlaps KVHandle"),
        (
            KVHandle(live.start_block_index, live.num_blocks, live.extents),
            "no allocator handed it out",
        ),
        (KVHandle(60, 4), "no allocator handed it out"),
        (KVHandle(-1, 0), "no allocator handed it out"),
        (KVHandle([], None), "no allocator handed it out"),
        (KVHandle(0, 4, 7), "no allocator handed it out"),
        (None, "no KVHandle"),
        (live.extents, "no KVHandle"),
    ]:
        before = pool.stats()
        with pytest.raises(CortexLabError, match=reason) as caught:
            pool.free(wrong)
        assert isinstance(caught.value, ValueError) and repr(wrong)[:40] in str(caught.value)
        assert pool.stats() == before
        pool.check()
    pool.free(live)
    assert pool.used_blocks() == 0


def test_a_freed_handle_stays_refused_when_its_blocks_are_handed_out_again():
    pool = KVBlockAllocator(4, strategy="buddy")
    first = pool.allocate(4)
    pool.free(first)
    again = pool.allocate(4)
    with pytest.raises(CortexLabError, match="freed already"):
        pool.free(first)
    assert again.extents == first.extents and pool.free_blocks() == 0


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2", None])
def test_a_size_below_one_block_is_refused_by_its_value(size):
    pool = KVBlockAllocator(4)
    for attempt in (pool.allocate, KVBlockAllocator, pool.dump_block_map):
        with pytest.raises(ValueError) as caught:
            attempt(size)
        assert isinstance(caught.value, CortexLabError) and repr(size) in str(caught.value)
    assert pool.free_blocks() == 4


def test_an_unknown_strategy_is_refused_by_name():
    with pytest.raises(CortexLabError, match="'worst_fit'"):
        KVBlockAllocator(4, strategy="worst_fit")


# --- threads --------------------------------------------------------------------------------------

NUM_BLOCKS = 1000


class Worker(Thread):
    """Allocates and frees at random, and marks its blocks in a map of owners kept beside the
    allocator.
    """

    def __init__(self, number: int, pool: KVBlockAllocator, owners: bytearray, steps: int):
        super().__init__()
        self.mark, self.pool, self.owners, self.steps = bytes([number]), pool, owners, steps
        self.rng = random.Random(number)
        self.held: list[KVHandle] = []
        self.refused = 0
        self.failure: Exception | None = None

    def run(self):
        try:
            for _ in range(self.steps):
                self.step()
            while self.held:
                self.give_back()
        except Exception as failure:
            self.failure = failure

    def step(self):
        if len(self.held) > 12 or (self.held and self.rng.random() < 0.5):
            return self.give_back()
        handle = self.pool.allocate(int(self.rng.random() * 30) + 1)
        if handle is None:
            self.refused += 1
            return None
        for start, size in handle.extents:
            self.change(start, size, b"\0", self.mark)
        self.held.append(handle)

    def give_back(self):
        handle = self.held.pop(int(self.rng.random() * len(self.held)))
        for start, size in handle.extents:
            self.change(start, size, self.mark, b"\0")
        self.pool.free(handle)

    def change(self, start, size, before, after):
        assert self.owners[start : start + size] == before * size, "blocks were handed out twice"
        self.owners[start : start + size] = after * size


@pytest.fixture
def threads_that_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # s; without the lock every strategy then fails within a second
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_that_take_turns_often")
@pytest.mark.parametrize(
    ("strategy", "operations"), [("first_fit", 1_000_000), ("buddy", 100_000), ("paged", 100_000)]
)
def test_eight_threads_lose_no_block_and_share_none(strategy, operations):
    pool, owners = KVBlockAllocator(NUM_BLOCKS, strategy), bytearray(NUM_BLOCKS)
    workers = [Worker(number, pool, owners, operations // 8) for number in range(1, 9)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.failure for worker in workers] == [None] * 8
    pool.check()
    assert owners == bytes(NUM_BLOCKS)
    assert pool.stats() == {
        "free_blocks": NUM_BLOCKS,
        "used_blocks": 0,
        "largest_free_run": NUM_BLOCKS,
        "num_holes": 1,
        "external_fragmentation": 0.0,
    }
    assert sum(worker.refused for worker in workers) > 0, (
        "the pool was never full: the test is too easy"
    )
