"""What the readers of trace formats share: a trace as it was understood, its rows, and checks whose
errors name file, line and column.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import BadInput, real, shown
from .synthetic import WorkItem

MAX_TOKENS = 10_000_000  # limit of a length: a longer request means a broken file
MAX_STAMP = 10**15
MOONCAKE_BLOCK = 512  # prompt tokens for each of Mooncake's hash ids
CONVERT = (
    "convert it to CSV with the columns arrived_at (seconds), num_prefill_tokens, num_decode_tokens"
)

Lines = Iterator[tuple[int, str]]  # numbers and texts of the lines that are not blank


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace as it was understood: its requests in order of arrival."""

    name: str
    format: str
    items: list[WorkItem]
    left_out: int = 0  # rows without prompt tokens or without output tokens
    spread_s: float | None = None  # most that a time stamp was moved by; None: all are exact
    notes: tuple[str, ...] = ()  # what else a reader of its figures should know

    @property
    def remarks(self) -> list[str]:
        """Everything that was not taken as it stands in the file."""
        rows = self.left_out + len(self.items)
        said = []
        if self.left_out:
            said.append(f"{self.left_out} of {rows} rows left out (0 prompt or output tokens)")
        if self.spread_s:
            said.append(
                f"time stamps in buckets of {self.spread_s:g} s, spread in them by the seed"
            )
        return [*said, *self.notes]

    def described(self) -> dict:
        """What a result's ``run.json`` says of it."""
        return {
            "name": self.name, "format": self.format, "requests": len(self.items),
            "left_out": self.left_out, "spread_s": self.spread_s, "remarks": self.remarks,
        }  # fmt: skip


@dataclass(slots=True)
class Rows:
    """Rows of a file that are requests, ``limit`` at most, and how many were none."""

    limit: int | None
    kept: list[tuple[float, int, int, tuple[int, ...]]] = field(default_factory=list)
    left_out: int = 0

    def add(self, stamp: float, prompt: int, output: int, ids: tuple[int, ...] = ()) -> bool:
        """Keep a row, or count it where it has no tokens; returns whether another is wanted."""
        if prompt and output:
            self.kept.append((stamp, prompt, output, ids))
        else:
            self.left_out += 1
        return len(self.kept) != self.limit

    @property
    def stamps(self) -> list[float]:
        return [row[0] for row in self.kept]

    def items(self, arrived: list[float], block: int = MOONCAKE_BLOCK) -> list[WorkItem]:
        """The requests in order of arrival, the first at 0."""
        first = min(arrived)
        items = [
            WorkItem(at - first, prompt, output, ids, block)
            for at, (_, prompt, output, ids) in zip(arrived, self.kept, strict=True)
        ]
        return sorted(items, key=lambda item: item.arrived_at)

    def check(self, name: str) -> None:
        """`BadInput` where no row was kept."""
        if not self.kept:
            why = f" ({self.left_out} rows without tokens)" if self.left_out else ""
            raise BadInput(f"{name}: the file holds no requests{why}")


def count(name: str, number: int, column: str, value: object, maximum: int = MAX_TOKENS) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
        raise BadInput(
            f"{name}, line {number}: {column} must be a whole number from 0 to {maximum}, not "
            f"{shown(value)}"
        )
    return value


def time_of(name: str, number: int, column: str, value: object) -> float:
    if not 0 <= real(value) <= MAX_STAMP:
        raise BadInput(
            f"{name}, line {number}: {column} must be a number from 0 to {MAX_STAMP}, not "
            f"{shown(value)}"
        )
    return value
