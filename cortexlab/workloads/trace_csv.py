"""CSV traces: a header that tells the format, and a row a request. One line is one row."""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from ..errors import BadInput, shown
from .trace_rows import CONVERT, Lines, Rows, Trace, count, time_of

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
STAMP = re.compile(  # date, time, digits of a fraction, zone
    r"(\d{4}-\d\d-\d\d)(?:[ T](\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,30}))? ?(Z|[+-]\d\d:?\d\d)?)?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of a CSV format."""

    format: str
    stamp: str
    prompt: str
    output: str

    @property
    def columns(self) -> tuple[str, str, str]:
        return self.stamp, self.prompt, self.output


AZURE = Table("Azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens")
VIDUR = Table("Vidur", "arrived_at", "num_prefill_tokens", "num_decode_tokens")
TABLES = (
    AZURE,
    Table("BurstGPT", "Timestamp", "Request tokens", "Response tokens"),
    VIDUR,
    Table("Splitwise", "arrival_timestamp", "prompt_size", "token_size"),
)


def read_csv(name: str, lines: Lines, limit: int | None) -> Trace:
    """The first ``limit`` requests of a CSV file, sorted among themselves."""
    fields = _fields(name, lines)
    number, header = next(fields)
    table = _table(name, number, header)
    where = {column: header.index(column) for column in table.columns if column in header}
    rows, dates = Rows(limit), Dates(name)
    for number, row in fields:
        if len(row) != len(header):
            raise BadInput(
                f"{name}, line {number}: {len(row)} fields, the header has {len(header)}"
            )
        given = {column: row[i] for column, i in where.items()}
        prompt, output = (
            count(name, number, column, _number(given[column]))
            for column in (table.prompt, table.output)
        )
        text = given.get(table.stamp, "0")
        if table is AZURE:
            stamp = dates.seconds(number, text)
        else:
            stamp = time_of(name, number, table.stamp, _number(text, float))
        if not rows.add(stamp, prompt, output):
            break
    rows.check(name)
    year = f" {2024 if dates.zoned else 2023}" if table is AZURE else ""
    notes = () if table.stamp in where else (f"no {table.stamp}: all requests arrive at 0",)
    items = rows.items(rows.stamps)
    return Trace(name, table.format + year, items, rows.left_out, notes=notes)


def _table(name: str, number: int, header: list[str]) -> Table:
    """The format of a header; Vidur's may lack its time stamps."""

    def missing(table: Table) -> list[str]:
        needed = table.columns[1:] if table is VIDUR else table.columns
        return [column for column in needed if column not in header]

    table = min(TABLES, key=lambda table: len(missing(table)))
    if not (absent := missing(table)):
        return table
    if len(absent) < len(table.columns[1:] if table is VIDUR else table.columns):
        raise BadInput(
            f"{name}, line {number}: column {absent[0]} is missing ({table.format} has "
            f"{', '.join(table.columns)}): {CONVERT}"
        )
    known = "; ".join(f"{table.format}: {', '.join(table.columns)}" for table in TABLES)
    raise BadInput(
        f"{name}, line {number}: no trace format has the columns {shown(', '.join(header), 80)} "
        f"({known}): {CONVERT}"
    )


def _fields(name: str, lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file with their line numbers, the header first."""
    for number, text in lines:
        try:
            row = next(csv.reader([text], skipinitialspace=True))
        except csv.Error as error:
            raise BadInput(f"{name}, line {number}: not CSV ({error}): {CONVERT}") from None
        yield number, [field.strip() for field in row]


def _number(text: str, kind: type = int) -> object:
    """``text`` as a number, else unchanged: an error message quotes it."""
    try:
        return kind(text) if text.isascii() and "_" not in text else text
    except ValueError:
        return text


@dataclass(slots=True)
class Dates:
    """Azure's time stamps. One without a zone is UTC, so that gaps are equal on every machine."""

    name: str
    zoned: bool = False  # of the first stamp
    # Whole seconds of the first stamp with a zone. Without one it stays 0: seconds since 1970 round
    # a fraction by up to 0.12 us, which every result from Azure's trace of 2023 was computed with.
    origin: float | None = None
    last: float = -math.inf

    def seconds(self, number: int, stamp: str) -> float:
        """Seconds of a stamp, for differences. One without a zone must not be before the last: a
        clock that was set back leaves gaps that cannot be told.
        """
        try:
            date, time, fraction, zone = STAMP.fullmatch(stamp).groups()
            at = datetime.fromisoformat(f"{date} {time or '00:00'}{zone or '+00:00'}")
            whole = (at - EPOCH).total_seconds()
        except (AttributeError, ValueError, OverflowError):
            raise BadInput(
                f"{self.name}, line {number}: TIMESTAMP must read like 2023-11-16 "
                f"18:15:46.6805900 or 2024-05-10 00:00:00.009930+00:00, not {shown(stamp)}"
            ) from None
        if self.origin is None:
            self.zoned, self.origin = bool(zone), whole if zone else 0.0
        seconds = whole - self.origin + (int(fraction) / 10 ** len(fraction) if fraction else 0)
        if not zone and seconds < self.last:
            raise BadInput(
                f"{self.name}, line {number}: TIMESTAMP goes back in time: sort the rows, or write "
                "each stamp's offset from UTC if a clock was set back"
            )
        self.last = seconds
        return seconds
