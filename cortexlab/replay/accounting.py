"""What a replay counts. The simulation says what happens; a `Ledger` keeps sums over steps, so that
steps that are alike cost no more than one.

    admit   compute   join   grow ... grow   leave        of one request
                             stall      join
    pass_time                                             of all, for each run of steps

`naive.py` follows the definitions to the letter, slot by slot.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from operator import itemgetter

from ..metrics import SHARES, counted_latency_summary, weighted_mean
from ..scheduler.block_manager import BlockManager
from ..scheduler.request import Request, RequestState
from .step_time import SECOND

LONG_EXTENT = 128  # tokens: from here on attention reads an extent about as fast as one whole view


@dataclass(slots=True)
class Clock:
    """Time of a replay."""

    now: int = 0  # nanoseconds
    step: int = 0  # number of the step


@dataclass(eq=False, slots=True)
class CountedRequest(Request):
    """A request of which only the number of tokens counts; it ends after ``output_length`` of them,
    at most ``max_tokens``.
    """

    output_length: int = 1
    final_slots: int = 1  # slots filled when it ends: the last token is sampled, but never written
    clock: Clock | None = None
    arrived_ns: int = 0
    first_ns: int | None = None  # end of the step that gave its first token
    last_ns: int = 0  # end of the step that gave its last token before it stood still
    finished_ns: int | None = None
    tokens_then: int = 0  # prompt and output when it joined or left the decoding requests
    decoding_since: int | None = None  # step at which it joined them; None while it does not decode
    num_ids: int = 0  # prefix ids of the trace; a block of ours may hold several
    ids_per_block: int = 1
    capacity: int = 0  # slots of its table, as the ledger has them
    grown_at: float = 0.0  # `Totals.weight` when they were counted

    @property
    def num_tokens(self) -> int:
        if self.decoding_since is None:
            return self.tokens_then
        return self.tokens_then + self.clock.step - self.decoding_since

    @property
    def internal(self) -> int:
        """Slots held that are never filled."""
        return max(0, self.capacity - self.final_slots)


@dataclass(slots=True)
class Totals:
    """Sums over steps. A step's shares are weighted by its time and divided by its H + X."""

    time: int = 0  # nanoseconds of steps
    weight: float = 0.0  # sum of time / (H + X)
    token: float = 0.0  # weight * slots with a token
    internal: float = 0.0  # weight * slots never filled; the rest of H is reserved
    external: float = 0.0  # weight * free slots of no use
    decode_tokens: int = 0  # tokens in the cache, over every decode step of every request
    decode_slots: int = 0  # slots held, over every decode step of every request
    decode_steps: int = 0  # of all requests
    written: int = 0  # prompt tokens computed
    copied_tokens: int = 0
    copied_blocks: int = 0
    peak_blocks: int = 0
    queued: int = 0  # nanoseconds of steps with a request waiting
    queued_free: int = 0  # time * free blocks of those steps
    prefix_ids: int = 0
    prefix_hits: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    num_extents: int = 0  # of finished requests
    final_tokens: int = 0  # of finished requests
    long_tokens: int = 0  # of finished requests, in extents of `LONG_EXTENT` tokens or more
    gaps: Counter = field(default_factory=Counter)  # nanoseconds between two tokens -> how often

    def shares(self) -> dict[str, float | None]:
        """The four shares of H + X, weighted by time."""
        parts = {"token": self.token, "internal": self.internal, "external": self.external}
        # fsum, since Python 3.12 adds floats in another way than 3.11.
        parts["reserved"] = max(0.0, self.time - math.fsum(parts.values()))
        return {f"{name}_share": over(parts[name], self.time) for name in SHARES}


class Ledger:
    """The live requests as a few sums, and `Totals` over steps.

    A decoding request gains a token a step, so all of them together have ``base_sum + num_decoding
    * step`` tokens; the others have ``still_tokens`` in the cache.
    """

    def __init__(self, blocks: BlockManager, clock: Clock):
        self.blocks, self.clock = blocks, clock
        self.totals = Totals()
        self.num_decoding = 0
        self.base_sum = 0  # tokens of the decoding requests at step 0, were the line drawn back
        self.decode_slots = 0  # held by the decoding requests
        self.still_tokens = 0  # in the cache, of requests that do not decode
        self.internal = 0  # slots held that are never filled

    # --- one request ------------------------------------------------------------------------------

    def admit(self, request: CountedRequest, num_cached: int) -> None:
        """Count a request whose blocks, from now on held, have ``num_cached`` tokens in them."""
        totals, table = self.totals, request.table
        request.capacity, request.grown_at = table.capacity, totals.weight
        self.still_tokens += num_cached
        self.internal += request.internal
        if request.num_preemptions == 0:
            prompt = len(request.prompt)
            found = table.num_found * request.ids_per_block
            totals.prompt_tokens += prompt
            totals.prefix_ids += request.num_ids
            totals.prefix_hits += min(found, request.num_ids)
            totals.hit_tokens += min(table.num_found * self.blocks.block_size, prompt)

    def compute(self, num_tokens: int) -> None:
        """Count computed prompt tokens of a request that does not decode yet."""
        self.still_tokens += num_tokens

    def join(self, request: CountedRequest, in_cache: int) -> None:
        """Count it as decoding from this step on, with ``in_cache`` tokens in the cache."""
        self.still_tokens -= in_cache
        self.num_decoding += 1
        self.base_sum += request.tokens_then - self.clock.step
        self.decode_slots += request.capacity
        request.decoding_since = self.clock.step

    def grow(self, request: CountedRequest) -> None:
        """Count what its table, while it decodes, may have grown by."""
        before, final = request.capacity, request.final_slots
        capacity = request.table.num_blocks * self.blocks.block_size
        if capacity != before:
            request.capacity, request.grown_at = capacity, self.totals.weight
            self.decode_slots += capacity - before
        if final <= capacity:
            self.internal += capacity - max(final, before)

    def stall(self, request: CountedRequest) -> None:
        """Count it as standing still, with the blocks it holds."""
        self._part(request)
        self.still_tokens += request.tokens_then - 1

    def leave(self, request: CountedRequest, ended: bool) -> None:
        """Count its blocks as gone. Unless it has ``ended``, slots thought reserved turn out to
        have been internal.
        """
        if request.decoding_since is not None:
            self._part(request)
            in_cache = request.tokens_then - 1
        else:
            in_cache = request.fills[-1]
            self.still_tokens -= in_cache
        self.internal -= request.internal
        if not ended:
            never = min(request.capacity, request.final_slots) - in_cache
            self.totals.internal += (self.totals.weight - request.grown_at) * never
        request.capacity = 0

    def finish(self, request: CountedRequest) -> None:
        """Count the extents that the tokens of a request lie in that is about to end."""
        totals, size = self.totals, self.blocks.block_size
        extents, left = request.table.all_extents, request.final_slots
        totals.num_extents += len(extents)
        totals.final_tokens += left
        if max(map(itemgetter(1), extents)) * size >= LONG_EXTENT:
            for _, num_blocks in extents:
                if num_blocks * size >= LONG_EXTENT:  # an extent may reach beyond its last token
                    totals.long_tokens += max(0, min(left, num_blocks * size))
                left -= num_blocks * size

    def _part(self, request: CountedRequest) -> None:
        """Take it out of the decoding requests."""
        tokens = request.num_tokens
        self.num_decoding -= 1
        self.base_sum -= request.tokens_then - request.decoding_since
        self.decode_slots -= request.capacity
        request.tokens_then, request.decoding_since = tokens, None
        request.last_ns = self.clock.now

    # --- all of them ------------------------------------------------------------------------------

    def pass_time(self, dt: int, steps: int, unusable: int, waiting: bool) -> None:
        """Count ``steps`` steps of ``dt`` ns, in each of which every decoding request gains a token
        and ``unusable`` free blocks are of no use to the head of the queue.
        """
        totals, blocks, decoding = self.totals, self.blocks, self.num_decoding
        held, size = blocks.num_held, blocks.block_size
        decode_tokens = (self.base_sum + decoding * self.clock.step) * steps
        decode_tokens += decoding * steps * (steps - 1) // 2
        still = self.still_tokens - _shared_tokens(blocks)
        weight = dt / ((held + unusable) * size)
        totals.time += dt * steps
        totals.weight += weight * steps
        totals.token += weight * (decode_tokens + still * steps)
        if self.internal:
            totals.internal += weight * self.internal * steps
        if unusable:
            totals.external += weight * unusable * size * steps
        totals.decode_tokens += decode_tokens
        totals.decode_slots += self.decode_slots * steps
        totals.decode_steps += decoding * steps
        totals.gaps[dt] += decoding * steps
        if held > totals.peak_blocks:
            totals.peak_blocks = held
        if waiting:
            totals.queued += dt * steps
            totals.queued_free += dt * steps * (blocks.num_blocks - held)

    def copy(self) -> None:
        """Count the moves owed as made."""
        for move in self.blocks.moves:
            self.totals.copied_tokens += move.num_tokens
            self.totals.copied_blocks += self.blocks.blocks_for(move.num_tokens)
        self.blocks.moves.clear()

    def slots(self, unusable: int, ahead: int) -> dict[str, int]:
        """The four shares in slots, ``ahead`` steps from now, and ``pool_slots``."""
        blocks, size = self.blocks, self.blocks.block_size
        token = self.still_tokens + self.base_sum - _shared_tokens(blocks)
        token += self.num_decoding * (self.clock.step + ahead)
        held = blocks.num_held * size
        return {
            "token_slots": token,
            "reserved_slots": held - token - self.internal,
            "internal_slots": self.internal,
            "external_slots": unusable * size,
            "pool_slots": blocks.num_blocks * size,
        }

    def row(self, requests: list[CountedRequest], samples: list[dict], last_arrival: int) -> dict:
        """The replay's row: measures over ``requests`` and the ``samples`` of the pool."""
        totals, blocks = self.totals, self.blocks
        done = [request for request in requests if request.state is RequestState.FINISHED]
        duration = self.clock.now / SECOND
        outputs = sum(request.output_length for request in done)
        inputs = sum(len(request.prompt) for request in done)
        ends = [sample["started_at"] for sample in samples[1:]] + [duration]
        spans = [end - sample["started_at"] for sample, end in zip(samples, ends, strict=True)]
        caching = blocks.prefix is not None and totals.prefix_ids > 0
        computed = totals.written + totals.decode_steps
        return {
            "completed": len(done),
            "completed_by_last_arrival": sum(each.finished_ns <= last_arrival for each in done),
            "failed": len(requests) - len(done),
            "tokens": inputs + outputs,
            "duration": duration,
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": over(len(done), duration),
            "output_throughput": over(outputs, duration),
            **counted_latency_summary(_latencies(done, totals.gaps)),
            **totals.shares(),
            "utilization": over(totals.decode_tokens, totals.decode_slots),
            "mean_live_tokens": over(totals.decode_tokens, totals.decode_steps),
            **{
                name: weighted_mean(zip(spans, (each[name] for each in samples), strict=True))
                for name in ("external_fragmentation", "num_holes")
            },
            "prefix_hit_rate": totals.prefix_hits / totals.prefix_ids if caching else None,
            "prefix_hit_tokens_rate": totals.hit_tokens / totals.prompt_tokens if caching else None,
            "long_extent_share": totals.long_tokens / totals.final_tokens if done else None,
            "extents_per_sequence": totals.num_extents / len(done) if done else None,
            "peak_blocks": totals.peak_blocks,
            "empty_share": (
                totals.queued_free / totals.queued / blocks.num_blocks if totals.queued else None
            ),
            "copied_blocks": totals.copied_blocks,
            "copied_share": totals.copied_tokens / computed if totals.written else None,
        }


def _latencies(done: list[CountedRequest], gaps: Counter) -> dict[str, Counter]:
    """Nanoseconds -> how often, of each latency."""
    return {
        "ttft": Counter(request.first_ns - request.arrived_ns for request in done),
        "tpot": Counter(
            (each.finished_ns - each.first_ns) / (each.output_length - 1)
            for each in done
            if each.output_length > 1
        ),
        "itl": gaps,
        "e2el": Counter(request.finished_ns - request.arrived_ns for request in done),
    }


def over(part: float, whole: float) -> float | None:
    """A quotient; None over nothing."""
    return part / whole if whole else None


def _shared_tokens(blocks: BlockManager) -> int:
    """Slots that sharing saves: of blocks, once for each holder beyond the first."""
    return blocks.prefix.num_shared * blocks.block_size if blocks.prefix is not None else 0
