"""The answer of a comparison in one sentence, and the statistics behind it.

Strategies of a bench take turns, and repeat i of one is compared with repeat i of another, so that
what slows the machine for a while slows both. All pairs are judged at once: their intervals hold
together in 95 % of the benches, whichever pair the sentence names, so that picking the fastest
makes no winner among equals. A replay is deterministic: there, a difference counts that is printed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np

from .metrics import COLUMNS, Column
from .options import MLX_LM

ERROR = 0.05  # chance that any interval of a bench misses, all its looks together
ALIKE, WITHIN = 1.03, "3 %"  # largest ratio of strategies that are called equal
MOST_TIMES = 100  # a difference that may be larger has no bound worth a number
LOOKS = 3, 5, 8, 12, 20  # repeats at which a bench that goes on until it knows looks
MOST_REPEATS = 1000  # more are not worth advising
AUTO = "auto"  # repeats of such a bench
SECONDS = 120.0  # after which such a bench starts no more


# --- statistics -----------------------------------------------------------------------------------


def error_of_look(repeats: int, before: int, last: bool) -> float:
    """Chance of an error that a look after ``repeats`` may take, where looks ``before`` it took
    theirs: the level is spent in step with the repeats (Lan and DeMets 1983, the spending function
    alpha * t), and the last look takes what is left. The sum is `ERROR`, however looks depend on
    each other, as long as what is seen does not decide when the last one comes.
    """
    spent = ERROR * before / LOOKS[-1]
    return ERROR - spent if last else ERROR * repeats / LOOKS[-1] - spent


@lru_cache(maxsize=256)
def range_quantile(k: int, df: int, level: float) -> float:
    """Quantile of the studentized range of ``k`` normal means with ``df`` degrees of freedom (Tukey
    1953). For two it is the square root of 2 times that of Student's t.

    With s = e^x the estimated over the true standard deviation, P(range <= q s) is integrated over
    s (Copenhaver and Holland 1988, equation 1) by the trapezoid rule, to five digits.
    """
    z = np.linspace(-7, 7, 71)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    grid = np.linspace(-8, 8, 1601)
    normal = np.array([math.erfc(-each / math.sqrt(2)) / 2 for each in grid])
    x = np.linspace(-20 / df - 6 / math.sqrt(df), 4 / math.sqrt(df), 160)
    log_weight = df * x - df * np.exp(2 * x) / 2
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()

    def below(q: float) -> float:
        lower = np.interp(z - q * np.exp(x)[:, None], grid, normal)
        within = k * density * (np.interp(z, grid, normal) - lower) ** (k - 1)
        return float(weight @ within.sum(axis=1)) * (z[1] - z[0])

    low, high = 0.0, 1.0
    while below(high) < level:
        high *= 2
    for _ in range(22):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < level else (low, middle)
    return high


@dataclass(frozen=True, slots=True)
class Difference:
    """Speed of ``strategy`` over that of ``against``: the geometric mean of the ratios repeat by
    repeat, and its interval, which holds together with all others of the bench.
    """

    strategy: str
    against: str
    ratio: float
    low: float
    high: float
    sd_log_ratio: float

    @property
    def most(self) -> float:
        """The largest ratio still possible, whichever is the faster."""
        return max(self.high, 1 / self.low)

    @property
    def equal(self) -> bool:
        """Whether the whole interval lies within 3 %."""
        return self.most <= ALIKE

    @property
    def faster(self) -> bool:
        """Whether ``strategy`` is the faster one, by a number that shows when it is printed."""
        return not self.equal and _at_least(self.low) >= 1

    @property
    def slower(self) -> bool:
        return self.turned.faster

    @property
    def known(self) -> bool:
        """Whether more repeats are not needed."""
        return self.equal or self.faster or self.slower

    @property
    def turned(self) -> "Difference":
        """The same difference, seen from ``against``."""
        sides = self.against, self.strategy, 1 / self.ratio, 1 / self.high, 1 / self.low
        return Difference(*sides, self.sd_log_ratio)

    @property
    def verdict(self) -> str:
        if self.equal:
            return f"equal within {WITHIN}"
        if self.known:
            return "faster" if self.faster else "slower"
        return "no difference found"


@dataclass(frozen=True)
class Comparison:
    """The strategies of a bench, each with its output tokens a second in every repeat."""

    speeds: Mapping[str, Sequence[float]]
    error: float = ERROR  # chance that any of the intervals misses

    @property
    def repeats(self) -> int:
        return min(map(len, self.speeds.values()), default=0)

    @property
    def pooled(self) -> list[str]:
        """Strategies that are held to the pool, the fastest first."""
        mean = {name: np.mean(_logs(each)) for name, each in self.speeds.items() if name != MLX_LM}
        return sorted(mean, key=mean.get, reverse=True)

    @cached_property
    def sd_log_ratio(self) -> float | None:
        """Standard deviation of the logarithm of a ratio of two strategies' speeds: what is left of
        the logarithms after strategy and repeat, of all strategies together. None for one repeat.
        """
        logs = _logs(list(self.speeds.values()))
        if self.repeats < 2 or len(logs) < 2:
            return None
        left = logs - logs.mean(axis=1, keepdims=True) - logs.mean(axis=0) + logs.mean()
        return math.sqrt(2 * (left**2).sum() / self._degrees(self.repeats))

    @cached_property
    def differences(self) -> list[Difference]:
        """All pairs, the faster strategies first. A pair that is noisier than the rest has a wider
        interval, by its own standard deviation: this keeps the error near 5 % where strategies
        differ in noise.
        """
        if self.sd_log_ratio is None:
            return []
        names = [*self.pooled, *(name for name in self.speeds if name == MLX_LM)]
        return [self._difference(*pair) for pair in combinations(names, 2)]

    def between(self, strategy: str, against: str) -> Difference:
        """The difference of two strategies, seen from ``strategy``."""
        for each in self.differences:
            if {each.strategy, each.against} == {strategy, against}:
                return each if each.strategy == strategy else each.turned
        raise KeyError((strategy, against))

    @property
    def known(self) -> bool:
        """Whether every pair of strategies is told apart or equal; mlx-lm, which no pool limits,
        counts only beside a single strategy.
        """
        pairs = [each for each in self.differences if MLX_LM not in (each.strategy, each.against)]
        return all(each.known for each in pairs or self.differences)

    def repeats_wanted(self) -> int:
        """Repeats after which intervals would be about as narrow as 3 %, by the noise seen."""
        own = (each.sd_log_ratio for each in self.differences if not each.known)
        noise = max(self.sd_log_ratio, *own)
        wanted = float(self.repeats)
        for _ in range(4):
            n = min(max(wanted, 2.0), MOST_REPEATS)
            quantile = range_quantile(len(self.speeds), self._degrees(round(n)), 1 - ERROR)
            wanted = (quantile / math.sqrt(2) * noise / math.log(ALIKE)) ** 2
        return max(math.ceil(wanted), self.repeats + 1)

    def as_dict(self) -> dict:
        """The comparison for JSON; ``sd_log_ratio`` of a pair is its own."""
        pairs = [
            {name: getattr(each, name) for name in Difference.__slots__} | {"verdict": each.verdict}
            for each in self.differences
        ]
        level = {"repeats": self.repeats, "level": 1 - self.error}
        return level | {"sd_log_ratio": self.sd_log_ratio, "pairs": pairs}

    def _degrees(self, repeats: int) -> int:
        return (len(self.speeds) - 1) * (repeats - 1)

    def _difference(self, strategy: str, against: str) -> Difference:
        logs = _logs(self.speeds[strategy]) - _logs(self.speeds[against])
        own, mean, n = float(logs.std(ddof=1)), float(logs.mean()), self.repeats
        quantile = range_quantile(len(self.speeds), self._degrees(n), 1 - self.error) / math.sqrt(2)
        half = quantile * max(own, self.sd_log_ratio) / math.sqrt(n)
        ends = (math.exp(mean + step) for step in (0, -half, half))
        return Difference(strategy, against, *ends, own)


def _logs(speeds: Sequence) -> np.ndarray:
    """Natural logarithms. Of no speed at all, where every request failed, a very small one's."""
    return np.log(np.maximum(np.asarray(speeds, dtype=float), 1e-9))


# --- words ----------------------------------------------------------------------------------------


def recommendation(
    rows: Sequence[Mapping],
    comparison: Comparison | None = None,
    shares: Comparison | None = None,
    auto: bool = False,
) -> str:
    """One sentence about a bench's rows and its ``comparison``, or about a replay's rows: which
    strategies are best, by how much, and where no difference was found. The first measure with a
    difference decides: speed, then memory; of a replay, requests served in time, or else waiting,
    then memory, then the pieces that a sequence lies in. ``shares``: token shares of a bench in
    every repeat, which are weighted by time and so have noise of their own. ``auto``: the bench was
    to go on until it knew.
    """
    if comparison is None:
        return _of_replay(rows)
    names = comparison.pooled
    if not names:
        return "Only mlx-lm was run: name a strategy to compare."
    share = replace(COLUMNS["token_share"], format=_whole_percent)
    memory = "share of the KV memory held that is tokens", share, max
    tokens = {row["strategy"]: row for row in rows if row["strategy"] in names}
    if len(comparison.speeds) == 1:
        speed = np.median(comparison.speeds[names[0]])
        part = share.text(tokens[names[0]]["token_share"])
        return f"{names[0]}: {speed:.1f} output tokens/s, {part} of the KV memory held is tokens."
    if not comparison.differences:
        other = "more --seconds" if auto else "--repeats auto"
        parts = [f"One run cannot tell speed from noise: --repeats 5 can, or {other}"]
        return "; ".join(parts + _decided(tokens, [memory])[1]) + "."
    noisy = () if shares is None else [each for each in shares.differences if not each.faster]
    best, parts = _fastest(comparison)
    open_to_memory = best if len(best) > 1 else names  # where speed decides, it is said of all
    left, said = _decided({name: tokens[name] for name in open_to_memory}, [memory], noisy)
    if len(left) < len(best):
        said = [f"memory decides, {each}" for each in said]
    beside = [_ahead(best, MLX_LM, comparison)] if MLX_LM in comparison.speeds else []
    parts += said + beside if parts else beside + said
    judged = best if len(names) > 1 else [*comparison.speeds]
    if not all(comparison.between(*pair).known for pair in combinations(judged, 2)):
        wanted = comparison.repeats_wanted()
        told = f"about {wanted}" if wanted <= MOST_REPEATS else f"more than {MOST_REPEATS:,}"
        parts.append(f"at this noise {told} repeats would show differences of {WITHIN}")
    return "; ".join(parts) + "."


def _fastest(comparison: Comparison) -> tuple[list[str], list[str]]:
    """Strategies among which speed does not decide, the fastest of all first, and what is said of
    their speed.
    """
    best, rest = [], []
    for name in comparison.pooled:
        behind = any(comparison.between(one, name).faster for one in best)
        (rest if behind else best).append(name)
    parts = []
    if len(best) > 1:
        alike = [name for name in comparison.speeds if name in best]  # in no order of speed
        pairs = [comparison.between(*pair) for pair in combinations(best, 2)]
        if all(each.equal for each in pairs):
            parts.append(f"{_listed(alike)}: equal within {WITHIN}")
        else:
            parts.append(f"{_listed(alike)}: no difference found ({_most(pairs)})")
    for name in rest:
        subject, verb, told = _ahead(best, name, comparison).partition(" faster than ")
        if parts and parts[-1].startswith(subject + verb):
            parts[-1] += f", than {told}"
        else:
            parts.append(subject + verb + told)
    return best, parts


def _ahead(best: Sequence[str], other: str, comparison: Comparison) -> str:
    """What is said of the speed of ``best`` beside another strategy's."""
    label = "mlx-lm's own batching, which no pool limits," if other == MLX_LM else other
    pairs = [comparison.between(name, other) for name in best]
    few = {1: best[0], 2: "both"}.get(len(best), "all")
    for verb, found in (
        ("faster", [each for each in pairs if each.faster]),
        ("slower", [each for each in pairs if each.slower]),
    ):
        if found:
            turned = [each if verb == "faster" else each.turned for each in found]
            low, high = min(each.low for each in turned), max(each.high for each in turned)
            by = f"by {_at_least(low)} % to {_at_most(high)} %"
            named = [each.strategy for each in found]
            subject = few if len(found) == len(best) else _listed(named, "and")
            if verb == "faster":
                return f"{subject} faster than {label} {by}"
            return f"{label} faster than {subject} {by}"
    if all(each.equal for each in pairs):
        return f"{few}: equal to {label} within {WITHIN}"
    return f"{few}: no difference found from {label.rstrip(',')} ({_most(pairs)})"


def _of_replay(rows: Sequence[Mapping]) -> str:
    """The sentence of a replay. Rows that leave more requests unserved than others are left out."""
    sizes = {row["block_size"] for row in rows}
    named = {
        row["strategy"] + (f" in blocks of {row['block_size']}" if len(sizes) > 1 else ""): row
        for row in rows
    }
    unserved = {name: row["refused"] + row["failed"] for name, row in named.items()}
    fewest = min(unserved.values())
    kept = {name: row for name, row in named.items() if unserved[name] == fewest}
    goodputs = (COLUMNS.get(name, Column(name, name)) for name in rows[0] if "goodput_" in name)
    aims = [(each.words, replace(each, format="{:.2f}".format), max) for each in goodputs]
    aims = aims or [("mean TTFT in seconds", COLUMNS["mean_ttft_ms"], min)]
    aims += [
        ("token share of the memory held", COLUMNS["token_share"], max),
        ("extents a sequence", COLUMNS["extents_per_sequence"], min),
    ]
    best, parts = _decided(kept, aims)
    if not parts:
        return "Nothing to compare: no request was completed."
    for count in sorted({*unserved.values()} - {0}):
        who = [name for name in named if unserved[name] == count]
        each = " each" if len(who) > 1 else ""
        requests = "request" if count == 1 else "requests"
        parts.append(f"{_listed(who, 'and')} left {count} {requests} unserved{each}")
    if len(named) == 1:
        return f"{best[0]}: {'; '.join(parts)}."
    found = "Best" if len(best) == 1 else "No difference found"
    return f"{found}: {_listed(best)}; {'; '.join(parts)}."


Aim = tuple[str, Column, Callable]  # words, a column, and which of its values is best


def _decided(
    rows: Mapping[str, Mapping], aims: Iterable[Aim], noisy: Iterable[Difference] = ()
) -> tuple[list[str], list[str]]:
    """Names that are best by the first of ``aims`` in which rows differ, then by the next, and what
    is said of each. Differences of the pairs in ``noisy`` are none: where such values differ in
    print, all that they span is said.
    """
    best, parts = [*rows], []
    same = {frozenset((each.strategy, each.against)) for each in noisy}
    for words, column, choose in aims:
        known = {name: rows[name][column.name] for name in best}
        known = {name: value for name, value in known.items() if value is not None}
        if not known:
            continue
        top = choose(known, key=known.get)
        alike = [
            name
            for name in known
            if _alike(column, known[name], known[top]) or frozenset((name, top)) in same
        ]
        text, others = column.text(known[top]), [name for name in known if name not in alike]
        spread = not all(_alike(column, known[name], known[top]) for name in alike)
        if spread:
            ends = sorted(known[name] for name in alike)
            text = f"{column.text(ends[0])} to {column.text(ends[-1])}"
        if not others and spread:
            parts.append(f"{words}: no difference found ({text})")
        elif not others:
            parts.append(f"{words}: {text}{('', '', ' for both', ' for all')[min(len(alike), 3)]}")
        else:
            following = choose(others, key=known.get)
            parts.append(
                f"{words}: {_listed(alike, 'and')} {text}, then {following} "
                f"{column.text(known[following])}"
            )
        best = alike
    return best, parts


def _alike(column: Column, value: float, other: float) -> bool:
    """Whether two values differ by less than the last digit that a table prints of them."""
    text = column.text(other)
    if column.digits:
        digits = column.digits(other / column.scale)
    else:
        digits = len(text.rstrip(" %").partition(".")[2])
    unit = column.scale * 10.0**-digits / (100 if text.endswith("%") else 1)
    return column.text(value) == text or abs(value - other) < unit


def _listed(names: Sequence[str], word: str = "or") -> str:
    """Names as a sentence lists them."""
    return f" {word} ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _most(pairs: Iterable[Difference]) -> str:
    """The largest difference still possible."""
    most = max(each.most for each in pairs)
    if most < 3:
        return f"at most {_at_most(most)} %"
    return f"at most {math.ceil(most)} times" if most <= MOST_TIMES else "no bound"


def _at_least(ratio: float) -> int:
    """Whole percent that a ratio is surely above 1."""
    return math.floor(100 * (ratio - 1) + 1e-9)


def _at_most(ratio: float) -> int:
    """Whole percent that a ratio is surely not above."""
    return math.ceil(100 * (ratio - 1) - 1e-9)
