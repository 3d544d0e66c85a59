"""JSONL traces: an object a request, of Mooncake's columns or more."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from ..errors import BadInput, shown
from .synthetic import MAX_ID, generator
from .trace_rows import CONVERT, MOONCAKE_BLOCK, Lines, Rows, Trace, count, time_of

MOONCAKE_BUCKET_S = 3.0  # time stamps in Mooncake's file are rounded down to a multiple
JITTER_MS = 5  # more than Mooncake's own stamps miss a multiple of a bucket by
BUCKETED = 0.99  # share of stamps on multiples of a bucket from which they count as rounded
SHORT_BLOCK = 16  # prompt tokens for each hash id of Bailian and of vLLM
LONGEST_GAP_S = 60.0  # mean gap beyond which stamps with fractions count as milliseconds
SHORTEST_GAP_MS = 1.0  # mean gap below which whole stamps count as seconds


def read_jsonl(name: str, lines: Lines, limit: int | None, seed: int, block: int | None) -> Trace:
    """The first ``limit`` requests of a JSONL file, sorted among themselves. ``seed`` spreads
    Mooncake's time stamps; ``block``: prompt tokens for each hash id.
    """
    rows, sessions, bailian = Rows(limit), Sessions(name), None
    blocks = [block] if block else [MOONCAKE_BLOCK, SHORT_BLOCK]
    for number, row in _objects(name, lines):
        if bailian is None and (bailian := {"chat_id", "parent_chat_id"} <= row.keys()):
            blocks = [block or SHORT_BLOCK]
        prompt, output = (
            count(name, number, column, row[column]) for column in ("input_length", "output_length")
        )
        stamp, ids = sessions.stamp(number, row), ()
        if prompt and output and row.get("hash_ids"):
            ids = _ids(name, number, row["hash_ids"])
            blocks = _fitting(name, number, blocks, len(ids), prompt)
        if not rows.add(stamp, prompt, output, _chained(ids) if bailian else ids):
            break
    rows.check(name)
    short = blocks[0] == SHORT_BLOCK and not sessions.at and any(row[3] for row in rows.kept)
    spread = not (bailian or short or sessions.delayed) and _in_buckets(rows.stamps)
    if spread:
        format, notes, arrived = "Mooncake", (), _spread(rows.stamps, seed)
    else:
        format = "Bailian" if bailian else "vLLM timed_trace" if short else sessions.format
        in_s, notes = bool(bailian), sessions.notes
        if short and not bailian:
            in_s, why = _in_seconds(rows.stamps, whole_in_ms=block is not None)
            notes = (f"time stamps taken as {'seconds' if in_s else 'milliseconds'} ({why})",)
        first = min(rows.stamps)
        arrived = [(stamp - first) / (1 if in_s else 1000) for stamp in rows.stamps]
    items = rows.items(arrived, blocks[0])
    return Trace(name, format, items, rows.left_out, MOONCAKE_BUCKET_S if spread else None, notes)


@dataclass(slots=True)
class Sessions:
    """Time stamps of a JSONL file, in its own unit. A turn without one arrives its delay after the
    turn before it in its session arrived.
    """

    name: str
    at: dict[str | int, float] = field(default_factory=dict)  # session -> arrival of its last turn
    delayed: bool = False  # some turn has a delay and no stamp

    def stamp(self, number: int, row: dict) -> float:
        session, stamp = row.get("session_id"), row.get("timestamp")
        if session is not None and not isinstance(session, str | int):
            raise BadInput(
                f"{self.name}, line {number}: session_id must be a text or a whole number, not "
                f"{shown(session)}"
            )
        if stamp is not None:
            stamp = time_of(self.name, number, "timestamp", stamp)
        elif session in self.at:
            delay = 0 if row.get("delay") is None else row["delay"]
            stamp = self.at[session] + time_of(self.name, number, "delay", delay)
            self.delayed = True
        else:
            raise BadInput(
                f"{self.name}, line {number}: timestamp is missing (only a later turn of a "
                f"session_id may have a delay instead): {CONVERT}"
            )
        if session is not None:
            self.at[session] = stamp
        return stamp

    @property
    def format(self) -> str:
        return "AIPerf" if self.at else "Mooncake"

    @property
    def notes(self) -> tuple[str, ...]:
        said = "a turn without a time stamp arrives its delay after the turn before arrived"
        return (said,) if self.delayed else ()


def _objects(name: str, lines: Lines) -> Iterator[tuple[int, dict]]:
    """Objects of a JSONL file that have lengths, with their line numbers."""
    for number, text in lines:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name}, line {number}: not JSON ({error}): {CONVERT}") from None
        if not isinstance(row, dict):
            raise BadInput(
                f"{name}, line {number}: not an object with timestamp, input_length and "
                f"output_length: write one a line, or {CONVERT}"
            )
        for column in ("input_length", "output_length"):
            if column not in row:
                raise BadInput(f"{name}, line {number}: {column} is missing: {CONVERT}")
        yield number, row


def _ids(name: str, number: int, ids: object) -> tuple[int, ...]:
    if not isinstance(ids, list):
        raise BadInput(f"{name}, line {number}: hash_ids must be a list of ids, not {shown(ids)}")
    return tuple(count(name, number, "hash_ids", each, MAX_ID) for each in ids)


def _fitting(name: str, number: int, blocks: list[int], num_ids: int, prompt: int) -> list[int]:
    """Those of ``blocks``, tokens an id, that give a prompt so many ids."""
    if fitting := [block for block in blocks if num_ids == -(-prompt // block)]:
        return fitting
    raise BadInput(
        f"{name}, line {number}: hash_ids must list one id for every {blocks[0]} of {prompt} "
        f"prompt tokens, not {num_ids} ids (trace_block says how many tokens an id stands for)"
    )


def _chained(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Ids of prefixes from ids of their blocks' contents: each is the hash of the one before it and
    its block's. Python hashes a pair of ints to the same value in every process.
    """
    chained, before = [], 0
    for each in ids:
        before = hash((before, each)) & MAX_ID
        chained.append(before)
    return tuple(chained)


def _in_seconds(stamps: list[float], whole_in_ms: bool) -> tuple[bool, str]:
    """Whether stamps beside short blocks are seconds, and why. vLLM replays such a file in any unit
    (a multiplier says which, by default seconds): Bailian's has seconds with fractions, Mooncake's
    whole milliseconds. ``whole_in_ms``: whole stamps are milliseconds whatever their gaps are.
    """
    gap = (max(stamps) - min(stamps)) / len(stamps)
    if any(stamp % 1 for stamp in stamps):
        if gap > LONGEST_GAP_S:
            return False, f"a mean gap over {LONGEST_GAP_S:g} s otherwise"
        return True, "some have fractions"
    if gap < SHORTEST_GAP_MS and not whole_in_ms:
        return True, f"a mean gap under {SHORTEST_GAP_MS:g} ms otherwise"
    return False, "all are whole numbers"


def _on_bucket(stamp: float, first: float) -> bool:
    """Whether a stamp (ms) is a multiple of Mooncake's bucket behind the first one."""
    behind = (stamp - first + JITTER_MS) % (MOONCAKE_BUCKET_S * 1000)
    return behind <= 2 * JITTER_MS


def _in_buckets(stamps: list[float]) -> bool:
    """Whether nearly all stamps (ms) are rounded to Mooncake's buckets: exact ones may be multiples
    of a bucket too (all at 0, one a minute), but do not share buckets beside one another.
    """
    bucket_ms = MOONCAKE_BUCKET_S * 1000
    on_bucket = [stamp for stamp in stamps if _on_bucket(stamp, stamps[0])]
    buckets = sorted({round((stamp - stamps[0]) / bucket_ms) for stamp in on_bucket})
    return (
        len(on_bucket) >= BUCKETED * len(stamps)
        and len(buckets) < len(on_bucket)
        and any(after - before == 1 for before, after in pairwise(buckets))
    )


def _spread(stamps: list[float], seed: int) -> list[float]:
    """Seconds of stamps that are rounded down to Mooncake's buckets: replayed as they stand, they
    would make bursts that never happened. Each is moved by a random part of a bucket; one that is
    not on a bucket stays.
    """
    parts = generator(seed).random(len(stamps)).tolist()
    return [
        stamp / 1000 + (part * MOONCAKE_BUCKET_S if _on_bucket(stamp, stamps[0]) else 0)
        for stamp, part in zip(stamps, parts, strict=True)
    ]
