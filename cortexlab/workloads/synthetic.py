"""Workloads: seeded arrivals and lengths, made or read from a trace. Tokens are drawn when a prompt
is needed; no MLX.

Sources of the lengths:

- ``chat``: quantiles of the Azure LLM inference trace, conversation (Patel et al., Splitwise, ISCA
  2024; CC-BY-4.0), joined by straight lines on a logarithmic scale.
- ``lognormal``, ``heavy-tail``: lognormal, clipped; medians and sigmas in `LENGTHS`.
- ``shared-prefix``: ``lognormal`` behind one system prompt of 512 tokens that all requests share.

Arrivals follow `vllm bench serve`: gaps are gamma distributed with mean 1 / rate and shape
``burstiness`` (1: Poisson).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from ..errors import BadInput, at_least, one_of, shown

SHARED_PREFIX_TOKENS = 512
MAX_SCALE, MIN_RATE = 1e6, 1e-6  # beyond these a number is a slip of the hand
MAX_REQUESTS = 10_000_000
MAX_POOL_SHARE = 1000.0


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request to come. Equal ``prefix_ids`` mean equal tokens: id i stands for prompt tokens
    ``i * prefix_block ...``.
    """

    arrived_at: float  # seconds from the start
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    prefix_block: int = 512
    max_tokens: int | None = (
        None  # what it asks for, where that is more than the ``output_tokens`` it stops after
    )

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def scaled(self, factor: float, rounded: Callable[[float], int] = math.ceil) -> "WorkItem":
        """Both lengths and the prefix block times ``factor``, rounded, at least 1."""
        lengths = (self.prompt_tokens, self.output_tokens, self.prefix_block)
        prompt, output, block = (max(1, rounded(length * factor)) for length in lengths)
        return replace(self, prompt_tokens=prompt, output_tokens=output, prefix_block=block)


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


LENGTHS: dict[str, tuple[Callable, Callable]] = {  # prompt, output
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

    Lengths shrink by one factor where the workload's longest possible request would not fit
    ``context`` tokens, then by ``scale_lengths``. ``request_rate`` is in requests a second;
    infinite: all arrive at time 0.
    """
    one_of("workload", name, LENGTHS)
    at_least("requests", num_requests, 1, MAX_REQUESTS)
    prompts, outputs = LENGTHS[name]
    shared = SHARED_PREFIX_TOKENS if name == "shared-prefix" else 0
    longest = prompts.longest + outputs.longest + shared
    factor = min(1.0, context / longest) if context else 1.0
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
    if factor < 1:
        items = [
            item.scaled(factor, math.floor) for item in items
        ]  # down, so that the longest still fits
    return scale(items, scale_lengths)


def generator(seed: int) -> np.random.Generator:
    """The source of lengths and arrivals for a seed."""
    return np.random.default_rng(at_least("seed", seed, 0))


def with_arrivals(
    items: Sequence[WorkItem], request_rate: float, burstiness: float, seed: int
) -> list[WorkItem]:
    """The same requests, arriving as `arrivals` says instead."""
    times = arrivals(len(items), request_rate, burstiness, generator(seed))
    return [replace(item, arrived_at=at) for item, at in zip(items, times, strict=True)]


def scale(items: Sequence[WorkItem], factor: float) -> list[WorkItem]:
    """Every item `WorkItem.scaled`; `BadInput` unless ``factor`` is a positive finite number."""
    if not (isinstance(factor, int | float) and 0 < factor <= MAX_SCALE):
        raise BadInput(
            f"scale-lengths must be a positive number of at most {MAX_SCALE:g}, not {factor!r}"
        )
    return list(items) if factor == 1 else [item.scaled(factor) for item in items]


def arrivals(
    num_requests: int, request_rate: float, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Arrival times in seconds, the first at 0."""
    if not request_rate >= MIN_RATE:
        raise BadInput(
            f"request-rate must be a number of requests per second from {MIN_RATE:g}, or inf, not "
            f"{request_rate!r}"
        )
    if not 0 < burstiness < math.inf:
        raise BadInput(f"burstiness must be a positive number, not {burstiness!r}")
    if math.isinf(request_rate):
        return [0.0] * num_requests
    gaps = rng.gamma(burstiness, 1 / (request_rate * burstiness), num_requests - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def default_max_seq_len(items: Sequence[WorkItem], context: int | None = None) -> int:
    """The longest request, rounded up to a power of two, at most ``context``: the region of
    ``static``.
    """
    longest = max(
        item.prompt_tokens + max(item.output_tokens, item.max_tokens or 0) for item in items
    )
    rounded = 1 << (longest - 1).bit_length()
    return rounded if context is None else min(context, rounded)


def pool_blocks(given: int | str, full: Callable[[], int]) -> int:
    """Blocks of a pool, given as a number or as a percentage of ``full()``, rounded up."""
    if isinstance(given, str) and given.removeprefix("-").isdecimal():
        given = int(given)
    if isinstance(given, int):
        return at_least("num-blocks", given, 1)
    try:
        share = float(given.removesuffix("%")) / 100 if given.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= MAX_POOL_SHARE:
        raise BadInput(
            "num-blocks must be a whole number of at least 1 or a percentage like 60%, not "
            f"{shown(given)}"
        )
    return at_least("num-blocks", math.ceil(share * full()), 1)


def shuffled_lengths(items: Sequence[WorkItem], seed: int) -> list[WorkItem]:
    """The same arrivals, prompts and outputs, dealt out anew: what depends on one trace's order
    does not survive it.
    """
    rng = generator(seed)
    prompts, outputs = rng.permutation(len(items)).tolist(), rng.permutation(len(items)).tolist()
    return [
        WorkItem(item.arrived_at, items[p].prompt_tokens, items[o].output_tokens)
        for item, p, o in zip(items, prompts, outputs, strict=True)
    ]


def prompt_tokens(items: Sequence[WorkItem], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random tokens for every item's prompt, the same for the same seed; equal prefix ids give
    equal tokens.

    What a token says does not matter to memory or time, so it is drawn evenly from the vocabulary.
    """
    at_least("seed", seed, 0)
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
    """Conversations behind one system prompt; each turn's prompt is all that was said before, and
    some more. In order of arrival.

    Conversations begin by a Poisson process of ``request_rate`` a second; a turn comes ``pause``
    seconds behind the one before, on average (exponential). What a user says and what the model
    answers is as long as in ``lognormal``. Prefix ids stand for ``unit`` tokens each, so block
    sizes that are its multiples find them.
    """
    at_least("conversations", num_conversations, 1)
    at_least("turns", num_turns, 1)
    at_least("system-tokens", system_tokens, 0)
    rng = generator(seed)
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
            del ids[said // unit :]  # the answer goes on inside it
            said += int(answer)
    return sorted(items, key=attrgetter("arrived_at"))
