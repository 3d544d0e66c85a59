"""Prefix sharing: the cache's order of eviction, and the blocks that the block manager shares,
copies, evicts and gives back.
"""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from named_blocks import NamedBlocks

from cortexlab import Extent, Request, RequestState
from cortexlab.allocators import STRATEGIES, strategy_of
from cortexlab.options import OOM_POLICIES
from cortexlab.scheduler.block_table import Move
from cortexlab.scheduler.prefix_cache import PrefixCache, block_hashes
from cortexlab.scheduler.scheduler import Scheduler


def ids_of(blocks) -> list[int]:
    return [block.prefix_id for block in blocks]


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 4), st.integers(0, 5))
def test_hashing_goes_on_after_the_blocks_hashed_before(tokens, size, num_known):
    whole = list(block_hashes(tokens, size))
    known = whole[:num_known]
    rest = block_hashes(tokens[len(known) * size :], size, known[-1] if known else b"")
    found = [*known, *rest]
    assert found == whole
    assert [(one.before, one.tokens) for one in found] == [(i.before, i.tokens) for i in whole]


# --- the cache alone ------------------------------------------------------------------------------


def cached(*prefix_ids: int) -> PrefixCache:
    """A cache of idle blocks, the least recently used first."""
    cache = PrefixCache()
    for prefix_id in prefix_ids:
        cache.add(prefix_id, (Extent(prefix_id, 1),))
    return cache


def evicted(cache: PrefixCache) -> list[int]:
    return [cache.evict().prefix_id for _ in range(cache.num_idle)]


def test_a_match_ends_before_the_first_block_that_is_not_cached():
    cache = cached(1, 2, 4)
    assert ids_of(cache.match([1, 2, 3, 4])) == [1, 2]
    assert cache.match([3, 1]) == cache.match([]) == []


def test_the_least_recently_used_block_is_evicted_first():
    assert evicted(cached(1, 2, 3)) == [1, 2, 3]


def test_a_block_just_released_is_evicted_last():
    cache = cached(1, 2, 3)
    held = cache.match([1])
    cache.hold(held)
    cache.release(held)
    assert evicted(cache) == [2, 3, 1]


def test_a_block_just_touched_is_evicted_last():
    cache = cached(1, 2)
    cache.touch(cache.match([1])[0])
    assert evicted(cache) == [2, 1]


def test_the_last_block_of_a_prompt_is_evicted_before_its_first():
    cache = cached(1, 2, 3)
    prompt = cache.match([1, 2, 3])
    cache.hold(prompt)
    cache.release(prompt)
    assert evicted(cache) == [3, 2, 1]


def test_a_held_block_is_never_evicted():
    cache = cached(1, 2)
    first = cache.match([1])
    cache.hold(first)
    assert (cache.num_idle, cache.num_shared) == (1, 0)
    cache.hold(first)
    assert (cache.num_idle, cache.num_shared) == (1, 1)
    assert evicted(cache) == [2]
    with pytest.raises(KeyError):
        cache.evict()
    cache.release(first)
    assert (cache.num_idle, cache.num_shared) == (0, 0), "one holder is left"
    cache.release(first)
    assert (cache.num_idle, cache.num_shared) == (1, 0)
    assert evicted(cache) == [1]


def test_an_evicted_or_forgotten_block_is_no_longer_found():
    cache = cached(1, 2, 3)
    assert cache.evict().extents == (Extent(1, 1),)
    cache.forget(cache.match([2]))
    assert len(cache) == 1
    assert cache.match([1]) == cache.match([2]) == []
    assert ids_of(cache.match([3])) == [3]
    cache.check()


class CacheMachine(RuleBasedStateMachine):
    """The cache beside a model of it: ids in order of use, and the number of holders of each id. A
    block without holders is idle.
    """

    def __init__(self):
        super().__init__()
        self.cache, self.order, self.holders, self.prompts = PrefixCache(), [], Counter(), []

    @rule(prefix_id=st.integers(0, 9))
    def add(self, prefix_id):
        if prefix_id not in self.order:
            self.cache.add(prefix_id, (Extent(prefix_id, 1),))
            self.order.append(prefix_id)

    @rule(prompt=st.lists(st.integers(0, 9), unique=True, max_size=5))
    def hold(self, prompt):
        found = self.cache.match(prompt)
        length = next((n for n, i in enumerate(prompt) if i not in self.order), len(prompt))
        assert ids_of(found) == prompt[:length]
        idle = self.cache.num_idle - sum(not self.holders[i] for i in prompt[:length])
        self.cache.hold(found)
        assert self.cache.num_idle == idle
        self.holders.update(prompt[:length])
        self.prompts.append(found)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def release(self, data):
        prompt = self.prompts.pop(data.draw(st.integers(0, len(self.prompts) - 1)))
        self.holders.subtract(ids_of(prompt))
        idle = [i for i in reversed(ids_of(prompt)) if not self.holders[i]]
        self.order = [i for i in self.order if i not in idle] + idle
        before = self.cache.num_idle
        self.cache.release(prompt)
        assert self.cache.num_idle == before + len(idle)

    @rule(prefix_id=st.integers(0, 9))
    def touch(self, prefix_id):
        for block in self.cache.match([prefix_id]):
            self.cache.touch(block)
            if not self.holders[prefix_id]:
                self.order.remove(prefix_id)
                self.order.append(prefix_id)

    @rule()
    def evict(self):
        idle = self.idle()
        if not idle:
            with pytest.raises(KeyError):
                self.cache.evict()
            return
        assert self.cache.evict().prefix_id == idle[0]
        self.order.remove(idle[0])

    @rule(data=st.data())
    def forget(self, data):
        gone = data.draw(st.lists(st.sampled_from(self.idle()), unique=True)) if self.idle() else []
        self.cache.forget([block for i in gone for block in self.cache.match([i])])
        self.order = [i for i in self.order if i not in gone]

    def idle(self) -> list[int]:
        return [i for i in self.order if not self.holders[i]]

    @invariant()
    def agree(self):
        self.cache.check()
        assert (len(self.cache), self.cache.num_idle) == (len(self.order), len(self.idle()))
        assert self.cache.num_shared == sum(max(0, n - 1) for n in self.holders.values())


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


# --- the block manager: stories, blocks of two slots ----------------------------------------------


def manager(strategy="paged", num_blocks=8, block_size=2, growth=None, **options) -> NamedBlocks:
    options["prefix_caching"] = True
    return NamedBlocks(strategy_of(strategy, growth), num_blocks, block_size, **options)


def admit(blocks: NamedBlocks, name: str, prompt_tokens: int, *prefix_ids: int, written=None):
    """Admit a sequence and count its prompt, or its first ``written`` tokens, as written. Returns
    its table and the number of tokens found.
    """
    assert blocks.allocate(name, prompt_tokens, prompt_tokens, prefix_ids, prompt_tokens)
    table = blocks.tables[name]
    found, table.num_tokens = table.num_tokens, prompt_tokens if written is None else written
    blocks.check()
    return table, found


def cached_in(blocks: NamedBlocks) -> list[int]:
    """Ids whose block is found when asked for alone."""
    return [i for i in range(20) if blocks.prefix.match([i])]


def test_two_sequences_hold_the_blocks_of_their_common_prefix_once():
    """1 2 3 of a and 1 2 4 of b: four blocks, not six."""
    blocks = manager()
    a, found = admit(blocks, "a", 6, 1, 2, 3)
    assert (found, blocks.num_held) == (0, 3)
    b, found = admit(blocks, "b", 6, 1, 2, 4)
    assert (found, b.num_found, blocks.num_held, blocks.free_blocks) == (4, 2, 4, 4)
    assert list(a.runs(0, 4)) == list(b.runs(0, 4)) == [(0, 4)]
    assert (list(a.runs(4, 6)), list(b.runs(4, 6))) == ([(4, 6)], [(6, 8)])
    blocks.free("a")
    blocks.check()
    assert (blocks.num_held, cached_in(blocks)) == (3, [1, 2, 3, 4])


def test_a_prompt_that_is_found_whole_computes_its_last_token_again():
    """The last token's logits are needed to sample the next."""
    blocks = manager()
    admit(blocks, "a", 4, 1, 2)
    b, found = admit(blocks, "b", 4, 1, 2)
    assert (found, b.num_found, blocks.num_held) == (3, 2, 2)


def test_idle_blocks_count_as_free_and_stay_cached_until_they_are_needed():
    blocks = manager(num_blocks=4)
    admit(blocks, "a", 6, 1, 2, 3)
    blocks.free("a")
    assert (blocks.free_blocks, blocks.stats().free_blocks, cached_in(blocks)) == (4, 1, [1, 2, 3])
    admit(blocks, "b", 2, 9)
    assert cached_in(blocks) == [1, 2, 3, 9], "the fourth block was free"
    admit(blocks, "c", 2, 8)
    assert cached_in(blocks) == [1, 2, 8, 9], "the last block of a's prompt goes first"
    assert blocks.allocate("d", 4, 4)
    assert (cached_in(blocks), blocks.free_blocks) == ([8, 9], 0)
    assert not blocks.allocate("e", 1, 1), "a held block was evicted"
    blocks.check()


def test_growth_evicts_as_few_blocks_as_it_needs():
    blocks = manager(num_blocks=4)
    admit(blocks, "a", 6, 1, 2, 3)
    blocks.free("a")
    admit(blocks, "b", 2, 9)
    assert blocks.grow("b", 4)
    assert (cached_in(blocks), blocks.free_blocks) == ([1, 2, 9], 2)
    blocks.check()


def test_a_blocked_sequence_moves_to_a_free_place_rather_than_evict():
    """x x x b z . . .   b grows; x is cached and idle, and there is room behind z."""
    blocks = manager("best_fit", block_size=1)
    admit(blocks, "x", 3, 1, 2, 3)
    assert blocks.allocate("b", 1, 1) and blocks.allocate("z", 1, 1)
    blocks.tables["b"].num_tokens = 1
    blocks.free("x")
    assert blocks.grow("b", 2)
    assert (cached_in(blocks), blocks.tables["b"].extents) == ([1, 2, 3], (Extent(5, 2),))
    blocks.check()


def test_a_partial_last_block_is_copied_not_shared():
    """Each answer follows the prompt's fifth token, so b copies that token to its own block."""
    blocks = manager()
    a, _ = admit(blocks, "a", 5, 1, 2, 3)
    b, found = admit(blocks, "b", 5, 1, 2, 3)
    assert (found, b.num_found) == (4, 3)
    assert (list(a.runs(4, 6)), list(b.runs(4, 6))) == ([(4, 6)], [(6, 8)])
    assert blocks.moves == [Move((Extent(2, 1),), (Extent(3, 1),), num_tokens=1)]
    assert blocks.num_held == 4


def test_a_partial_block_that_is_not_yet_written_is_not_copied():
    """b is admitted in the step that computes a's prompt; a copy is made before that step runs."""
    blocks = manager()
    admit(blocks, "a", 1, 1, written=0)
    _, found = admit(blocks, "b", 1, 1)
    assert (found, blocks.moves) == (0, [])


def test_an_idle_partial_block_is_copied_though_only_one_block_is_free():
    """The source is idle, and may be overwritten after the copy."""
    blocks = manager(num_blocks=2)
    admit(blocks, "a", 1, 1)
    blocks.free("a")
    admit(blocks, "b", 1, 1)
    assert [move.source for move in blocks.moves] == [(Extent(0, 1),)]
    assert blocks.num_held == 1


KEPT = [(6, 6, [1, 2, 3]), (6, 5, [1, 2]), (6, 4, [1, 2]), (6, 0, [])]
KEPT += [(5, 5, [1, 2, 3]), (5, 4, [1, 2]), (5, 3, [1])]


@pytest.mark.parametrize(("prompt", "written", "kept"), KEPT)
def test_blocks_that_were_not_written_to_their_end_are_forgotten(prompt, written, kept):
    """A sequence preempted in the middle of its prompt leaves only blocks that are whole."""
    blocks = manager()
    admit(blocks, "a", prompt, 1, 2, 3, written=written)
    blocks.free("a")
    blocks.check()
    assert (cached_in(blocks), blocks.free_blocks) == (kept, 8)
    assert blocks.stats().used_blocks == len(kept)


def test_a_block_that_another_sequence_holds_is_not_forgotten():
    blocks = manager()
    admit(blocks, "a", 4, 1, 2)
    admit(blocks, "b", 6, 1, 2, 3, written=4)
    blocks.free("b")
    assert cached_in(blocks) == [1, 2]
    blocks.free("a")
    assert cached_in(blocks) == [1, 2]


def books(blocks: NamedBlocks) -> tuple:
    """Everything that the block manager records of sequences and moves."""
    tables = {
        name: (table.extents, tuple(table.shared), table.num_tokens)
        for name, table in blocks.tables.items()
    }
    return tables, list(blocks.moves), blocks.num_held, blocks.num_releases


def snapshot(blocks: NamedBlocks) -> tuple:
    """Books, statistics and cache."""
    return books(blocks), blocks.stats(), cached_in(blocks), blocks.prefix.num_idle


def test_a_refused_sequence_leaves_books_and_cache_as_they_were():
    """c wants five blocks; two of its blocks are cached and idle, two more blocks are free."""
    blocks = manager(num_blocks=5, block_size=1)
    admit(blocks, "a", 3, 1, 2, 3)
    assert blocks.allocate("b", 1, 1)
    blocks.free("a")
    before = snapshot(blocks)
    assert not blocks.allocate("c", 5, 5, (1, 2, 7, 8, 9), 5)
    assert snapshot(blocks) == before
    assert evicted(blocks.prefix) == [3, 2, 1], "the refusal counted as use"


def test_a_prompt_that_fits_an_empty_pool_is_served_though_idle_blocks_divide_it():
    """. . . 1 . .   Block 1 is in a's prompt and divides the free blocks; no request will end and
    free more.
    """
    blocks = manager("cortexstream", num_blocks=6, block_size=1)
    scheduler = Scheduler(blocks.manager, max_batch_size=1, max_step_tokens=99)
    blocks.allocate("x", 3, 3)
    admit(blocks, "y", 1, 1)
    blocks.free("x")
    blocks.free("y")
    scheduler.add(Request("a", tuple(range(2)), 5, prefix_ids=(1, 2)))
    step = scheduler.schedule(0.0)
    assert (step.failed, [chunk.request.id for chunk in step.chunks]) == ([], ["a"])


@pytest.mark.parametrize(("strategy", "max_seq_len"), [("static", 4), ("cortexstream_buddy", None)])
def test_a_strategy_that_hands_out_several_blocks_at_once_cannot_share(strategy, max_seq_len):
    with pytest.raises(ValueError, match=f"prefix_caching.*'{strategy}'"):
        manager(strategy, num_blocks=8, max_seq_len=max_seq_len)


# --- ids that contradict each other ---------------------------------------------------------------


@pytest.mark.parametrize("second", [(3, 2), (2, 1), (2, 2), (3, 1, 2), (1, 3, 2), (3, 3, 3)])
@pytest.mark.parametrize("live", [True, False], ids=["held", "idle"])
def test_prompts_whose_ids_contradict_each_other_lose_no_block(second, live):
    """1 2 of a, 3 2 of b: block 2 stands for the prefix 1 2, so b may not hold it; a keeps it."""
    blocks = manager(num_blocks=12)
    admit(blocks, "a", 4, 1, 2)
    if not live:
        blocks.free("a")
    b, _ = admit(blocks, "b", 2 * len(second), *second)
    assert b.num_blocks == len(second)
    if len(set(second)) == len(second):
        slots = {slot for run in b.runs(0, 99) for slot in range(*run)}
        assert len(slots) == 2 * len(second), "two of b's tokens share a slot"
    for name in ("a", "b") if live else ("b",):
        assert blocks.grow(name, 2 * len(second) + 3)
        blocks.tables[name].num_tokens += 1
        blocks.check()
    admit(blocks, "c", 4, 1, 2)
    for name in ("c", "b", "a") if live else ("b", "c"):
        blocks.free(name)
        blocks.check()
    assert (blocks.num_held, blocks.free_blocks) == (0, 12)
    assert blocks.stats().used_blocks == blocks.prefix.num_idle
    assert blocks.allocate("whole", 24, 24), "a block is lost"
    blocks.check()


@pytest.mark.parametrize("strategy", ["paged", "best_fit", "runs", "buddy"])
def test_ids_drawn_at_random_lose_no_block(strategy):
    """Random ids stand for no prefix: the blocks found may be wrong, the books are right."""
    for seed in range(30):
        rng = random.Random(f"{strategy} {seed}")
        size = rng.randint(1, 3)
        blocks = manager(strategy, rng.randint(4, 14), size)
        for _ in range(80):
            name = rng.choice("abcd")
            if name not in blocks.tables:
                prompt = rng.randint(1, 4 * size)
                ids = tuple(rng.randint(1, 5) for _ in range(blocks.blocks_for(prompt)))
                if blocks.allocate(name, prompt, prompt + 2, ids, prompt):
                    written = prompt if rng.random() < 0.8 else rng.randint(0, prompt)
                    blocks.tables[name].num_tokens = written
            elif rng.random() < 0.4:
                tokens = blocks.tables[name].num_tokens + 1
                if blocks.grow(name, tokens):
                    blocks.tables[name].num_tokens = tokens
            else:
                blocks.free(name)
            blocks.moves.clear()
            blocks.check()
        for name in list(blocks.tables):
            blocks.free(name)
        blocks.check()
        assert blocks.free_blocks == blocks.num_blocks


# --- blocks that a prompt wants -------------------------------------------------------------------


def test_a_prompt_wants_the_blocks_not_yet_held_idle_ones_among_them():
    """Blocks of two: a holds 1 2 3, and prompts of seven tokens want what a does not hold."""
    blocks = manager()
    assert blocks.blocks_wanted(7, 7, (1, 2, 4, 5), 7) == 4
    admit(blocks, "a", 6, 1, 2, 3)
    prompts = (1, 2, 4, 5), (1, 2, 3, 5), (1, 9, 3, 5), (), (4, 1, 2, 3)
    assert [blocks.blocks_wanted(7, 7, ids, 7) for ids in prompts] == [2, 1, 3, 4, 4]
    assert blocks.blocks_wanted(6, 6, (1, 2, 3), 6) == 0
    assert blocks.blocks_wanted(8, 8, (1, 2, 3), 6) == 1, "for two tokens sampled before"
    blocks.free("a")
    assert blocks.blocks_wanted(7, 7, (1, 2, 3, 5), 7) == 4, "idle blocks are wanted too"


def test_a_partial_last_block_is_wanted_because_it_is_copied():
    blocks = manager()
    admit(blocks, "a", 5, 1, 2, 3)
    assert blocks.blocks_wanted(5, 5, (1, 2, 3), 5) == 1


def test_a_prompt_wants_all_the_blocks_of_its_reservation():
    blocks = manager(growth="reserve")
    admit(blocks, "a", 4, 1, 2)
    assert blocks.blocks_wanted(4, 11, (1, 2), 4) == 4


# --- the contents of blocks -----------------------------------------------------------------------

SHARING = sorted(STRATEGIES.keys() - {"static", "cortexstream_buddy"})  # hand out single blocks
known_ids: dict[str, int] = {}


def prompt_ids(letters: str, block_size: int) -> tuple[int, ...]:
    """One id a block, for the text up to the block's end, as in Mooncake's trace."""
    ends = range(block_size, len(letters) + block_size, block_size)
    return tuple(known_ids.setdefault(letters[:end], len(known_ids)) for end in ends)


class Content:
    """Content of the arena: for every written slot, the text that ends with the slot's token. A
    sequence must find its own text in its slots.
    """

    def __init__(self, blocks: NamedBlocks):
        self.blocks, self.slots = blocks, {}

    def follow(self) -> None:
        """Make the recorded moves."""
        size = self.blocks.block_size
        for move in self.blocks.moves:
            source, target = (
                [s for e in extents for s in range(e.start * size, e.end * size)]
                for extents in (move.source, move.target)
            )
            taken = [self.slots.get(slot) for slot in source[: move.num_tokens]]
            self.slots.update(zip(target, taken, strict=False))
        self.blocks.moves.clear()

    def write(self, sequence: str, text: str, start: int, stop: int) -> None:
        for token, slot in enumerate(self.places(sequence, stop)):
            if token >= start:
                self.slots[slot] = text[: token + 1]

    def check(self, sequence: str, text: str, stop: int) -> None:
        found = [self.slots.get(slot) for slot in self.places(sequence, stop)]
        assert found == [text[: n + 1] for n in range(stop)], sequence

    def places(self, sequence: str, stop: int) -> list[int]:
        return [slot for run in self.blocks.tables[sequence].runs(0, stop) for slot in range(*run)]


def admit_text(content: Content, name: str, text: str, most: int, rng, evicts_nothing) -> bool:
    """Admit a sequence and compute its prompt, one time in five only a part, and preempt it there.
    True if the sequence stays. ``evicts_nothing``: a refusal leaves the cache as it was.
    """
    blocks, length = content.blocks, len(text)
    before, books_before, cached_before = snapshot(blocks), books(blocks), set(cached_in(blocks))
    if not blocks.allocate(name, length, most, prompt_ids(text, blocks.block_size), length):
        assert books(blocks) == books_before
        assert set(cached_in(blocks)) <= cached_before
        assert not evicts_nothing or snapshot(blocks) == before
        return False
    content.follow()
    computed = blocks.tables[name].num_tokens
    assert computed < length
    content.check(name, text, computed)
    stop = length if rng.random() < 0.8 else rng.randint(computed, length - 1)
    content.write(name, text, computed, stop)
    blocks.tables[name].num_tokens = stop
    if stop < length:
        blocks.free(name)
    return stop == length


@pytest.mark.parametrize("growth", [None, "reserve", "chain", "relocate"])
@pytest.mark.parametrize("strategy", SHARING)
def test_every_sequence_finds_its_own_tokens_and_no_block_is_lost(strategy, growth):
    """Sequences are admitted, computed in part, grown and preempted, in a pool too small for all;
    every action is followed by `check`.
    """
    for seed in range(12):
        rng = random.Random(f"{strategy} {growth} {seed}")
        size = rng.randint(1, 3)
        blocks = manager(strategy, rng.randint(4, 14), size, growth)
        content, texts, longest = Content(blocks), {}, {}
        for _ in range(120):
            name = rng.choice("abcd")
            action = rng.random()
            if name not in texts:
                length = rng.randint(1, 3) * size + rng.randint(0, 2)
                text = "".join(rng.choice("01") for _ in range(length))
                most = length + rng.randint(0, 5)
                if admit_text(content, name, text, most, rng, evicts_nothing=strategy == "paged"):
                    texts[name], longest[name] = text, most
            elif action < 0.7 and len(texts[name]) < longest[name] + 4:
                text = texts[name] + rng.choice("01")
                idle = blocks.prefix.num_idle
                if blocks.grow(name, len(text)):
                    content.follow()
                    content.write(name, text, len(text) - 1, len(text))
                    texts[name], blocks.tables[name].num_tokens = text, len(text)
                else:
                    assert not blocks.moves and blocks.prefix.num_idle <= idle
            else:
                blocks.free(name)
                del texts[name]
            blocks.check()
            num_free = blocks.stats().free_blocks + blocks.prefix.num_idle
            assert blocks.free_blocks == num_free, "idle blocks do not count as free"
            for other, text in texts.items():
                content.check(other, text, len(text))
        for name in texts:
            blocks.free(name)
        blocks.check()
        assert blocks.free_blocks == blocks.num_blocks


@pytest.mark.parametrize("oom_policy", OOM_POLICIES)
def test_a_chunk_reads_only_tokens_written_by_earlier_chunks(oom_policy):
    """Small budgets, a small pool, and prompts with much in common: blocks found are blocks
    written.
    """
    for seed in range(60):
        rng = random.Random(f"{oom_policy} {seed}")
        size = rng.randint(1, 3)
        blocks = manager("paged", rng.randint(6, 16), size)
        limits = {"max_batch_size": 3, "max_step_tokens": rng.randint(3, 9)}
        scheduler = Scheduler(blocks.manager, oom_policy=oom_policy, **limits)
        content, texts = Content(blocks), {}
        for n in range(12):
            text = "".join(rng.choice("01") for _ in range(size)) * rng.randint(1, 2)
            text += "1" * rng.randint(0, size)
            prompt, ids = tuple(range(len(text))), prompt_ids(text, size)
            request = Request(f"r{n}", prompt, rng.randint(1, 6), prefix_ids=ids)
            if blocks.could_ever_hold(request.max_slots):
                texts[request.id] = text + "x" * request.max_tokens
                scheduler.add(request)
        for _ in range(500):
            step = scheduler.schedule(0.0)
            blocks.check()
            content.follow()
            blocks.tables = {each.id: each.table for each in scheduler.running}
            for request, start, stop in step.chunks:
                content.write(request.id, texts[request.id], start, stop)
            for request, _, stop in step.chunks:
                content.check(request.id, texts[request.id], stop)
                if stop == request.num_tokens:
                    request.output_tokens.append(0)
                    request.state = RequestState.DECODING
                    if len(request.output_tokens) == request.max_tokens:
                        scheduler.remove(request)
        assert not scheduler.running and not scheduler.waiting
        assert blocks.free_blocks == blocks.num_blocks
