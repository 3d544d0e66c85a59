"""Groups of layers: stories on toy pools, then every strategy against an arena of named tokens."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cortexlab.allocators import GROWTHS, STRATEGIES, Paged, strategy_of
from cortexlab.scheduler.block_manager import BlockManager
from cortexlab.scheduler.block_table import Need, Way, slot_runs
from cortexlab.scheduler.layer_groups import (
    GroupedBlocks,
    LayerGroup,
    block_manager,
    copies,
    layer_groups,
)
from cortexlab.scheduler.prefix_cache import block_hashes

FIVE_TO_ONE = [32, 32, 32, 32, 32, None]
GIVES_BACK = ["best_fit", "segregated", "paged", "runs"]  # to the block, after the prompt


class Bare:
    """A user's allocator with no optional part."""

    def __init__(self, num_blocks: int):
        self._pool = Paged(num_blocks)
        self.num_blocks = num_blocks
        for verb in ("allocate", "extend", "free", "stats", "check"):
            setattr(self, verb, getattr(self._pool, verb))

    allocate = extend = free = stats = check = None


# --- which layers form a group --------------------------------------------------------------------


def test_layers_without_a_window_stay_one_group_of_all():
    assert layer_groups([None] * 4) == (LayerGroup((0, 1, 2, 3), 4),)
    assert layer_groups([8] * 3) == (LayerGroup((0, 1, 2), 3, 8),)


def test_groups_have_as_many_layers_as_see_all_tokens():
    groups = layer_groups(FIVE_TO_ONE)
    assert [group.window for group in groups] == [None, 32, 32, 32, 32, 32]
    assert [group.layers for group in groups] == [(5,), (0,), (1,), (2,), (3,), (4,)]


def test_gemma_3_4b_has_seven_groups_of_five_with_one_empty_layer():
    windows = [None if layer % 6 == 5 else 1024 for layer in range(34)]
    groups = layer_groups(windows)
    assert len(groups) == 7 and {group.size for group in groups} == {5}
    assert sum(group.size - len(group.layers) for group in groups) == 1
    assert sorted(layer for group in groups for layer in group.layers) == list(range(34))


def test_groups_take_the_size_that_leaves_fewer_layers_empty():
    assert [len(group.layers) for group in layer_groups([None] * 5 + [16] * 6)] == [5, 6]


# --- how many blocks ------------------------------------------------------------------------------


def pool(strategy: str, num_blocks: int = 800, windows=FIVE_TO_ONE, chunk: int = 64, **more):
    groups = layer_groups(windows)
    return GroupedBlocks(groups, chunk, strategy_of(strategy), num_blocks, 16, **more)


def served(blocks: GroupedBlocks, prompt: int, chunk: int, output: int = 0) -> list[int]:
    """Blocks held after each step of one request, first by chunks, then by single tokens."""
    table = blocks.allocate(Need(prompt, prompt + output, chunk=chunk))
    held, done = [], 0
    while done < prompt + output:
        done = min(prompt, done + chunk) if done < prompt else done + 1
        assert blocks.grow(table, done)
        table.num_tokens = done
        blocks.moves_made()
        blocks.check()
        held.append(blocks.num_held)
    blocks.free(table)
    assert blocks.num_held == 0 and not blocks.sequences
    return held


@pytest.mark.parametrize("strategy", GIVES_BACK)
@pytest.mark.parametrize("chunk", [1, 16, 40, 64])
def test_windows_hold_what_they_see_and_no_more(strategy, chunk):
    held = served(pool(strategy, chunk=chunk), 1000, chunk, output=40)
    most = 63 + 5 * (-(-(31 + chunk) // 16) + 1)
    assert max(held[: -(-1000 // chunk)]) <= most
    assert max(held[-40:]) <= 65 + 5 * 3  # 1,040 tokens; all layers alike would hold 390


def test_a_buddy_rounds_each_ring_and_reservations_keep_theirs():
    assert served(pool("buddy", 2048), 1000, 64, output=8)[-1] == 64 + 5 * 4
    ring = -(-(31 + 64) // 16) + 1
    assert set(served(pool("cortexstream"), 1000, 64, output=8)) == {63 + 5 * ring}
    static = pool("static", max_seq_len=1008)
    assert set(served(static, 1000, 64, output=8)) == {63 + 5 * ring}


def test_a_short_sequence_needs_no_ring():
    assert served(pool("cortexstream"), 10, 64, output=6) == [6] * 7
    assert served(pool("paged"), 10, 64, output=6) == [6] * 7


def test_a_sequence_fits_or_not_as_all_its_parts_do():
    blocks = pool("paged", num_blocks=78)
    assert blocks.could_ever_hold(16) and not blocks.could_ever_hold(1000)
    assert pool("paged", 63 + 5 * 7).could_ever_hold(1000)
    assert pool("cortexstream", 63 + 5 * 7).could_ever_hold(1000)
    assert not pool("cortexstream", 63 + 5 * 7 - 1).could_ever_hold(1000)
    assert blocks.allocate(Need(1000, 1000)) is None and blocks.num_held == 0


def test_a_refused_part_gives_the_others_back():
    blocks = pool("best_fit", 12, windows=[None, 4])
    a, _ = blocks.allocate(Need(16, 16)), blocks.allocate(Need(16 * 3, 16 * 3))
    blocks.free(a)  # two holes: of 2 blocks, and the last
    before, releases = blocks.num_held, blocks.num_releases
    assert blocks.free_blocks >= 5
    assert blocks.allocate(Need(16 * 4, 16 * 4, chunk=16)) is None
    assert (blocks.num_held, blocks.num_releases) == (before, releases)
    blocks.check()


def test_what_a_window_passes_is_given_to_others_at_once():
    blocks = pool("paged", 63 + 5 * 7)
    table = blocks.allocate(Need(1000, 1000, chunk=64))
    releases = blocks.num_releases
    blocks.grow(table, 64)
    table.num_tokens = 64
    assert blocks.num_releases == releases
    blocks.grow(table, 128)
    assert blocks.num_releases > releases, "a refused request may ask again"


def test_models_without_windows_have_an_ordinary_block_manager():
    plain = block_manager(layer_groups([None, None]), 8, strategy_of("paged"), 4, 16)
    assert type(plain) is BlockManager
    assert type(block_manager(layer_groups([8]), 8, strategy_of("paged"), 4, 16)) is GroupedBlocks


# --- prefixes -------------------------------------------------------------------------------------


def ids_of(tokens: range) -> tuple:
    return tuple(block_hashes(tokens, 16))


def computed(blocks: GroupedBlocks, prompt: range, chunk: int = 64):
    """A prompt's table once all of it is computed, and how many blocks it found."""
    need = Need(len(prompt), len(prompt) + 8, ids_of(prompt), len(prompt), chunk=chunk)
    table = blocks.allocate(need)
    while table.num_tokens < len(prompt):
        stop = min(len(prompt), table.num_tokens + chunk)
        assert blocks.grow(table, stop)
        table.num_tokens = stop
        blocks.check()
    return table


@pytest.mark.parametrize("strategy", ["paged", "runs"])
def test_twenty_prompts_that_share_1000_tokens_find_62_blocks_each(strategy):
    blocks = pool(strategy, 2048, prefix_caching=True)
    tables = [computed(blocks, range(1000))]
    for n in range(1, 20):
        tables.append(computed(blocks, (*range(1000), 1000 + n, 7, 7)))
        assert tables[-1].num_found == 62
    assert blocks.num_held < 62 + 20 * (2 + 5 * 5), "the shared blocks are counted once"
    for table in tables:
        blocks.free(table)
    assert blocks.num_held == 0
    later = computed(blocks, range(1000))
    assert later.num_found == 62, "blocks that nobody holds are found again"
    blocks.free(later)
    blocks.check()


def test_blocks_behind_a_window_stay_in_the_cache_until_memory_is_wanted():
    blocks = pool("paged", 63 + 5 * 7, prefix_caching=True)
    table = computed(blocks, range(1000))
    assert blocks.num_held == 63 + 5 * 5  # the last chunk had 40 tokens
    assert blocks.prefix.num_idle == blocks.free_blocks - blocks.stats().free_blocks > 0
    blocks.free(table)
    for each in [*blocks.prefix._blocks.values()]:  # memory is wanted
        if each.prefix_id[0] == 3 and len(blocks.prefix._blocks) > 1:
            blocks.prefix.forget([each])
            blocks.allocator.free(each.extents)
    table = computed(blocks, range(1000))
    assert table.num_found == 0, "one group has lost what the next token sees"


def test_a_hit_ends_where_all_windows_still_have_what_the_next_token_sees():
    blocks = pool("paged", 2000, prefix_caching=True)
    blocks.free(computed(blocks, range(1000)))
    lost = ids_of(range(1000))[40]
    blocks.prefix.forget([block := blocks.prefix.match([(2, lost)])[0]])
    blocks.allocator.free(block.extents)
    table = computed(blocks, range(1000))
    assert table.num_found == 62, "block 40 is behind every window"
    blocks.free(table)
    shorter = computed(blocks, range(42 * 16 + 5))
    assert shorter.num_found == 40, "two blocks before the border: 40 and 41, or 39 and 38"
    blocks.free(shorter)
    blocks.check()


# --- every token where its table says -------------------------------------------------------------

WINDOWS = [None, 5, None, 5, 5, 9]
CHUNK, SIZE = 6, 2


class Sequence:
    def __init__(self, name: int, prompt: list[int], output: int):
        # Of a story there are several sequences; they begin alike.
        self.name, self.prompt, self.most = name, prompt, len(prompt) + output
        self.ids = tuple(block_hashes(prompt, SIZE))
        self.num_tokens = len(prompt)  # known so far: prompt and output
        self.table = self.swapped = None

    def tokens(self, stop: int) -> tuple[int, ...]:
        """Prompt and output; each token is its own hash."""
        output = [1000 * self.name + i for i in range(stop - len(self.prompt))]
        return (*self.prompt, *output)[:stop]


class AgainstNamedTokens(RuleBasedStateMachine):
    """An arena holds, in each slot that was written, a group and the tokens up to that position.
    Whatever the strategy, a group's table finds all tokens that its layers see.
    """

    def __init__(self, strategy, growth, shares):
        super().__init__()
        self.strategy, self.shares = strategy_of(strategy, growth), shares

    @initialize(num_blocks=st.integers(12, 60), max_moved=st.sampled_from([None, 4]))
    def make(self, num_blocks, max_moved):
        self.groups = layer_groups(WINDOWS)
        self.pool = GroupedBlocks(
            self.groups, CHUNK, self.strategy, num_blocks, SIZE, 20, self.shares, max_moved
        )
        self.host_pool = GroupedBlocks(self.groups, CHUNK, strategy_of("paged"), 40, SIZE)
        self.arena, self.host = {}, {}
        self.live: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.names = 0

    @rule(prompt=st.integers(1, 14), same=st.integers(0, 14), output=st.integers(1, 10))
    def arrive(self, prompt, same, output):
        self.names += 1
        if self.pool.could_ever_hold(prompt + output):
            tokens = [i if i < same else 100 * self.names + i for i in range(prompt)]
            self.waiting.append(Sequence(self.names, tokens, output))

    @precondition(lambda self: self.waiting)
    @rule(chunk=st.integers(1, CHUNK))
    def admit(self, chunk):
        sequence = self.waiting[0]
        back = sequence.swapped.num_tokens if sequence.swapped else 0
        # As the engine does, prompts are computed one after the other.
        if any(each.table.num_tokens < len(each.prompt) for each in self.live):
            return
        need = Need(
            sequence.num_tokens, sequence.most, sequence.ids if self.shares else (),
            len(sequence.prompt), num_back=back, chunk=chunk,
        )  # fmt: skip
        before, wanted = self.pool.free_blocks, self.pool.blocks_wanted(need)
        table = self.pool.allocate(need)
        if table is None:
            assert self.pool.free_blocks == before
            assert self.live, "an empty pool takes what it can ever hold"
            return
        assert self.shares or before - self.pool.free_blocks >= wanted
        self.waiting.pop(0)
        self.live.append(sequence)
        sequence.table = table
        if back > table.num_tokens:
            self.pool.moves += copies(sequence.swapped, table, Way.BACK)
            table.num_tokens = back
        if back:
            self.host_pool.free(sequence.swapped)
            sequence.swapped = None
        self.make_moves()
        self.see(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), chunk=st.integers(1, CHUNK))
    def step(self, data, chunk):
        sequence = data.draw(st.sampled_from(self.live))
        start = sequence.table.num_tokens
        stop = min(sequence.num_tokens, start + chunk)
        grown = self.pool.grow(sequence.table, stop)
        self.make_moves()
        if not grown:
            return
        sequence.table.num_tokens = stop
        for group, part in enumerate(sequence.table.parts):
            slots = slots_of(part.runs(start - part.skipped, stop - part.skipped))
            assert len(slots) == stop - start
            for position, slot in zip(range(start, stop), slots, strict=True):
                self.arena[slot] = group, sequence.tokens(position + 1)
        self.see(sequence)
        if stop == sequence.num_tokens:
            sequence.num_tokens += 1
            if sequence.num_tokens > sequence.most:
                self.end(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), swap=st.booleans())
    def give_way(self, data, swap):
        sequence = data.draw(st.sampled_from(self.live))
        num_tokens = sequence.table.num_tokens
        need = Need(num_tokens, num_tokens, num_back=num_tokens)
        if swap and num_tokens and (out := self.host_pool.allocate(need)):
            self.pool.moves += copies(sequence.table, out, Way.OUT)
            sequence.swapped, out.num_tokens = out, num_tokens
        self.pool.free(sequence.table)
        self.live.remove(sequence)
        self.waiting.append(sequence)
        self.make_moves()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        self.end(data.draw(st.sampled_from(self.live)))

    @invariant()
    def books_agree(self):
        if hasattr(self, "pool"):
            self.pool.check()
            self.host_pool.check()
            for sequence in self.live:
                self.see(sequence)

    @precondition(lambda self: self.shares)
    @rule()
    def forget(self):
        self.pool.prefix.forget_all()

    def end(self, sequence):
        whole = sequence.table.num_tokens // SIZE * SIZE
        ids = tuple(block_hashes(sequence.tokens(whole), SIZE)) if self.shares else ()
        self.pool.free(sequence.table, ids)
        self.live.remove(sequence)

    def see(self, sequence: Sequence) -> None:
        """What the next token sees lies in its slots."""
        stop = sequence.table.num_tokens
        for group, part in enumerate(sequence.table.parts):
            window = self.groups[group].window
            first = 0 if window is None else max(0, stop - window + 1)
            slots = slots_of(part.runs(first - part.skipped, stop - part.skipped))
            assert [self.arena.get(slot) for slot in slots] == [
                (group, sequence.tokens(position + 1)) for position in range(first, stop)
            ]

    def make_moves(self) -> None:
        places = {
            Way.WITHIN: (self.arena, self.arena),
            Way.OUT: (self.arena, self.host),
            Way.BACK: (self.host, self.arena),
        }
        for move in self.pool.moves:
            source, target = places[move.way]
            slots = (
                slots_of(slot_runs(extents, SIZE, move.skipped, move.num_tokens))
                for extents in (move.source, move.target)
            )
            pairs = list(zip(*slots, strict=True))
            assert len(pairs) == move.num_tokens - move.skipped
            moved = [(to, source.get(at)) for at, to in pairs]
            target.update(moved)
        self.pool.moves_made()


def slots_of(runs) -> list[int]:
    return [slot for run in runs for slot in range(*run)]


NAMED = [(name, None) for name in STRATEGIES]
OTHERS = [
    ("best_fit", "chain"),
    ("buddy", "chain"),
    ("cortexstream", "chain"),
    ("runs", "relocate"),
    ("paged", "relocate"),
    (Bare, None),
]
RESERVED = [("runs", "reserve"), (Bare, "reserve")]
SHARED = [pair for pair in (*NAMED, *OTHERS) if strategy_of(*pair).gives_front]


@pytest.mark.parametrize(
    ("strategy", "growth", "shares"),
    [
        *((*pair, False) for pair in (*NAMED, *OTHERS, *RESERVED)),
        *((*pair, True) for pair in SHARED),
    ],
    ids=str,
)
def test_every_group_finds_the_tokens_that_it_sees(strategy, growth, shares):
    assert growth is None or growth in GROWTHS
    run_state_machine_as_test(
        lambda: AgainstNamedTokens(strategy, growth, shares),
        settings=settings(max_examples=60, stateful_step_count=60, deadline=None),
    )
