"""Workloads: seeded arrivals and lengths of requests, and random tokens for their prompts.

Sources of the lengths:

- ``chat``: quantiles of the Azure LLM inference trace, conversation (Patel et al., Splitwise, ISCA
  2024; CC-BY-4.0), interpolated on a logarithmic scale.
- ``lognormal``, ``heavy-tail``: clipped lognormals; their medians and sigmas stand in `LENGTHS`.
- ``shared-prefix``: ``lognormal`` behind one system prompt of 512 tokens that all requests share.

Arrivals follow `vllm bench serve`: gaps are gamma distributed with mean 1 / rate and shape
``burstiness`` (1: Poisson).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np

from ..errors import BadInput, a_number, a_sequence, at_least, one_of, real, shown, whole

SHARED_PREFIX_TOKENS = 512
MAX_SCALE, MIN_RATE = 1e6, 1e-6  # limits that no intended scale or rate exceeds
MAX_REQUESTS = 10_000_000
REPLAY_REQUESTS, REPLAY_RATE = 5000, 5.0  # of a replay by default; requests per second
MAX_POOL_SHARE = 1000.0
MAX_ID = 2**63 - 1  # limit of a prefix id


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request to come. Prompts with equal leading ``prefix_ids`` have equal tokens there: the
    entry at index i stands for prompt tokens from ``i * prefix_block`` to the next multiple.
    """

    arrived_at: float  # seconds since the workload's start
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    prefix_block: int = 512
    max_tokens: int | None = None  # limit of the request, if more than its ``output_tokens``

    def __post_init__(self):
        put = partial(object.__setattr__, self)
        put("arrived_at", a_number("arrived_at", self.arrived_at))
        for name in ("prompt_tokens", "output_tokens", "prefix_block"):
            put(name, at_least(name, getattr(self, name), 1))
        ids = a_sequence("prefix_ids", self.prefix_ids)
        put("prefix_ids", tuple(at_least("prefix id", each, 0, MAX_ID) for each in ids))
        if self.max_tokens is not None:
            put("max_tokens", at_least("max_tokens", self.max_tokens, 0))

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def limit(self) -> int:
        """Tokens that its request may yield."""
        return max(self.output_tokens, self.max_tokens or 0)

    def scaled(self, factor: float, rounded: Callable[[float], int] = math.ceil) -> "WorkItem":
        """This item with its lengths and prefix block times ``factor``, rounded, at least 1. Ids of
        blocks that begin behind the new prompt's end are cut off.
        """
        lengths = (self.prompt_tokens, self.output_tokens, self.prefix_block)
        prompt, output, block = (max(1, rounded(length * factor)) for length in lengths)
        ids = self.prefix_ids[: -(-prompt // block)]
        return replace(
            self, prompt_tokens=prompt, output_tokens=output, prefix_ids=ids, prefix_block=block
        )


def checked_items(items: Sequence[WorkItem]) -> tuple[WorkItem, ...]:
    """The requests ``items``, or `BadInput` when there is none or something else among them."""
    return a_sequence("items", items, WorkItem, least=1)


def _lognormal(median: float, sigma: float, low: int, high: int):
    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return np.clip(np.exp(rng.normal(math.log(median), sigma, n)).round(), low, high).astype(
            int
        )

    draw.longest = high
    return draw


def _quantiles(knots: dict[float, int]):
    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return (
            np.exp(np.interp(rng.random(n), list(knots), np.log(list(knots.values()))))
            .round()
            .astype(int)
        )

    draw.longest = max(knots.values())
    return draw


LENGTHS: dict[str, tuple[Callable, Callable]] = {  # workload -> (prompt, output) distributions
    "chat": (
        _quantiles({0: 2, 0.1: 207, 0.5: 1020, 0.9: 2734, 0.99: 4142, 1: 14050}),
        _quantiles({0: 7, 0.1: 54, 0.5: 129, 0.9: 424, 0.99: 601, 1: 1000}),
    ),
    "lognormal": (_lognormal(100, 0.8, 8, 600), _lognormal(40, 0.7, 4, 200)),
    "heavy-tail": (_lognormal(120, 1.1, 8, 2000), _lognormal(60, 0.7, 16, 200)),
    "shared-prefix": (_lognormal(100, 0.8, 8, 600), _lognormal(40, 0.7, 4, 200)),
}


def make_workload(
    name: str,
    num_requests: int,
    *,
    seed: int = 0,
    context: int | None = None,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    scale_lengths: float = 1.0,
) -> list[WorkItem]:
    """``num_requests`` items of the named workload, in order of arrival.

    Lengths shrink by one factor if the workload's longest possible request exceeds ``context``
    tokens, and are then multiplied by ``scale_lengths``. ``request_rate`` is in requests per
    second; with ``math.inf`` all requests arrive at time 0.
    """
    one_of("workload", name, LENGTHS)
    num_requests = at_least("num_requests", num_requests, 1, MAX_REQUESTS)
    prompts, outputs = LENGTHS[name]
    shared = SHARED_PREFIX_TOKENS if name == "shared-prefix" else 0
    longest = prompts.longest + outputs.longest + shared
    factor = 1.0 if context is None else min(1.0, at_least("context", context, 1) / longest)
    rng = generator(seed)
    lengths = zip(
        prompts(rng, num_requests).tolist(), outputs(rng, num_requests).tolist(), strict=True
    )
    items = [
        WorkItem(at, prompt + shared, output, (0,) if shared else (), SHARED_PREFIX_TOKENS)
        for (prompt, output), at in zip(
            lengths, arrivals(num_requests, request_rate, burstiness, rng), strict=True
        )
    ]
    if factor < 1:  # rounded down, so that the longest request fits the context
        items = [item.scaled(factor, math.floor) for item in items]
    return scale(items, scale_lengths)


def generator(seed: int) -> np.random.Generator:
    """Random generator of lengths and arrivals for ``seed``; `BadInput` for a negative seed."""
    return np.random.default_rng(at_least("seed", seed, 0))


def with_arrivals(
    items: Sequence[WorkItem], request_rate: float, burstiness: float, seed: int
) -> list[WorkItem]:
    """The requests ``items`` with new arrival times, drawn by `arrivals`."""
    items = checked_items(items)
    times = arrivals(len(items), request_rate, burstiness, generator(seed))
    return [replace(item, arrived_at=at) for item, at in zip(items, times, strict=True)]


def scale(items: Sequence[WorkItem], factor: float) -> list[WorkItem]:
    """All items with lengths times ``factor``; `BadInput` unless it is positive and finite."""
    items, times = checked_items(items), real(factor)
    if not 0 < times <= MAX_SCALE:
        raise BadInput(
            f"scale_lengths must be a positive number of at most {MAX_SCALE:g}, not {shown(factor)}"
        )
    return list(items) if times == 1 else [item.scaled(times) for item in items]


def arrivals(
    num_requests: int, request_rate: float, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Arrival times of ``num_requests`` requests in seconds, the first at 0."""
    rate, shape = real(request_rate), real(burstiness)
    if not rate >= MIN_RATE:
        raise BadInput(
            f"request_rate must be a number of requests per second from {MIN_RATE:g}, or inf, not "
            f"{shown(request_rate)}"
        )
    if not 0 < shape < math.inf:
        raise BadInput(f"burstiness must be a positive number, not {shown(burstiness)}")
    if math.isinf(rate):
        return [0.0] * num_requests
    gaps = rng.gamma(shape, 1 / (rate * shape), num_requests - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def default_max_seq_len(items: Sequence[WorkItem], context: int | None = None) -> int:
    """Tokens of a region of ``static``: the longest request rounded up to a power of two, at most
    ``context``.
    """
    longest = max(item.prompt_tokens + item.limit for item in items)
    rounded = 1 << (longest - 1).bit_length()
    return rounded if context is None else min(context, rounded)


def pool_blocks(given: int | str, full: Callable[[], int], other: str = "") -> int:
    """Blocks of a pool: a number, or a percentage of ``full()`` rounded up. ``other``: what a
    message names before these two.
    """
    text = given if isinstance(given, str) else ""
    is_short = len(text) <= len(str(MAX_ID))  # int() refuses a text of thousands of digits
    number = int(text) if is_short and text.removeprefix("-").isdecimal() else whole(given)
    if number is not None:
        return at_least("num_blocks", number, 1)
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= MAX_POOL_SHARE:
        raise BadInput(
            f"num_blocks must be {other}a whole number of at least 1 or a percentage like 60%, not "
            f"{shown(given)}"
        )
    return at_least("num_blocks", math.ceil(share * full()), 1)


def shuffled_lengths(items: Sequence[WorkItem], seed: int) -> list[WorkItem]:
    """A control for effects of a trace's order: its arrivals with its prompt lengths and its output
    lengths, each shuffled by ``seed``.
    """
    rng, items = generator(seed), checked_items(items)
    prompts, outputs = rng.permutation(len(items)).tolist(), rng.permutation(len(items)).tolist()
    return [
        WorkItem(item.arrived_at, items[p].prompt_tokens, items[o].output_tokens)
        for item, p, o in zip(items, prompts, outputs, strict=True)
    ]


def prompt_tokens(items: Sequence[WorkItem], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random tokens for every item's prompt, determined by ``seed``; equal prefix ids give equal
    tokens.

    Tokens are drawn evenly from the vocabulary: their meaning changes neither memory nor time.
    """
    seed = at_least("seed", seed, 0)
    prompts = []
    for index, item in enumerate(items):
        tokens: list[int] = []
        for prefix_id in item.prefix_ids:
            tokens += (
                np.random.default_rng([seed, 1, prefix_id])
                .integers(vocabulary, size=item.prefix_block)
                .tolist()
            )
        own = max(0, item.prompt_tokens - len(tokens))
        tokens += np.random.default_rng([seed, 0, index]).integers(vocabulary, size=own).tolist()
        prompts.append(tokens[: item.prompt_tokens])
    return prompts


def conversations(
    num_conversations: int,
    num_turns: int,
    system_tokens: int,
    *,
    request_rate: float,
    pause: float = 30.0,
    unit: int = 16,
    seed: int = 0,
) -> list[WorkItem]:
    """Turns of conversations that share one system prompt, in order of arrival. A turn's prompt is
    the whole conversation so far and a new message of the user.

    Conversations begin by a Poisson process of ``request_rate`` per second. The pause between two
    turns is exponential with a mean of ``pause`` seconds. Messages and answers have the lengths of
    ``lognormal``. A prefix id stands for ``unit`` tokens: a cache finds prefixes if its block size
    is a multiple of ``unit``.
    """
    num_conversations = at_least("num_conversations", num_conversations, 1)
    num_turns, unit = at_least("num_turns", num_turns, 1), at_least("unit", unit, 1)
    system_tokens = at_least("system_tokens", system_tokens, 0)
    pause, rng = a_number("pause", pause, 0), generator(seed)
    says, answers = LENGTHS["lognormal"]
    new_id = itertools.count(system_tokens // unit)
    items = []
    for begun in arrivals(num_conversations, request_rate, 1.0, rng):
        ids, said = list(range(system_tokens // unit)), system_tokens
        gaps = rng.exponential(pause, num_turns)
        gaps[0] = 0.0
        for at, more, answer in zip(
            begun + np.cumsum(gaps), says(rng, num_turns), answers(rng, num_turns), strict=True
        ):
            said += int(more)
            ids += [next(new_id) for _ in range(-(-said // unit) - len(ids))]
            items.append(WorkItem(float(at), said, int(answer), tuple(ids), unit))
            del ids[said // unit :]  # the answer fills the prompt's last partial unit
            said += int(answer)
    return sorted(items, key=attrgetter("arrived_at"))
