"""Readers of real traces: Azure's CSV and Mooncake's JSONL. An error names the file, the line and
the column.
"""

import contextlib
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from ..errors import BadInput, shown
from ..host.paths import cache_folder
from .synthetic import WorkItem, generator

KNOWN = {  # name of a trace -> (its file name, its public source)
    "azure_2023_conv": (
        "azure_2023_conv.csv",
        "data/AzureLLMInferenceTrace_conv.csv in the public repository Azure/AzurePublicDataset",
    ),
    "mooncake_conversation": (
        "mooncake_conversation.jsonl",
        "FAST25-release/traces/conversation_trace.jsonl in the public repository "
        "kvcache-ai/Mooncake",
    ),
}
MAX_TOKENS = 10_000_000  # limit of a length: a longer request means a broken file
MOONCAKE_BUCKET_S = 3.0  # time stamps in Mooncake's file are rounded down to a multiple
MOONCAKE_BLOCK = 512  # prompt tokens for each of Mooncake's hash ids


def load_trace(name: str, seed: int = 0) -> list[WorkItem]:
    """Requests of a trace in order of arrival: ``name`` is a file or a name of `KNOWN`. ``seed``
    spreads Mooncake's time stamps (`read_mooncake`).
    """
    path = find_trace(name)
    return read_azure(path) if path.suffix.lower() == ".csv" else read_mooncake(path, seed)


def known_here() -> list[str]:
    """Names of `KNOWN` whose trace file is on this machine."""
    found = []
    for name in KNOWN:
        with contextlib.suppress(BadInput):
            found += [name] if find_trace(name) else []
    return found


def find_trace(name: str) -> Path:
    """Path of a trace: ``name`` itself if it is a file, else the known trace's file in
    ``$CORTEXLAB_TRACES`` or the user's cache. Raises `BadInput` if there is none.
    """
    if name not in KNOWN:
        path = Path(name)
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise BadInput(
                f"unknown trace {shown(name)}: use one of {', '.join(sorted(KNOWN))}, or a .csv "
                "(Azure) or .jsonl (Mooncake) file"
            )
        if not os.path.isfile(path):
            raise BadInput(f"trace file {shown(name)} does not exist")
        return path
    file, source = KNOWN[name]
    folders = [
        Path(folder) for folder in (os.environ.get("CORTEXLAB_TRACES"), cache_folder()) if folder
    ]
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    places = " or ".join(str(folder) for folder in folders)
    raise BadInput(
        f"trace {name!r} is not in {places}: save {source} there as {file} (or set "
        "CORTEXLAB_TRACES to the file's folder)"
    )


def read_azure(path: Path) -> list[WorkItem]:
    """Read CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens; its first row is time 0."""
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    rows = _fields(path)
    _, header = next(rows)
    if missing := [column for column in columns if column not in header]:
        raise BadInput(
            f"{path}, line 1: column {missing[0]} is missing (needed: {', '.join(columns)})"
        )
    where = [header.index(column) for column in columns]
    items, first = [], None
    for number, row in rows:
        if len(row) != len(header):
            raise BadInput(
                f"{path}, line {number}: {len(row)} fields, the header has {len(header)}"
            )
        stamp, prompt, output = (row[i] for i in where)
        seconds = _seconds(path, number, stamp)
        first = seconds if first is None else first
        lengths = [
            _count(path, number, column, _number(text))
            for column, text in zip(columns[1:], (prompt, output), strict=True)
        ]
        if items and seconds - first < items[-1].arrived_at:
            raise BadInput(f"{path}, line {number}: TIMESTAMP goes back in time")
        items.append(WorkItem(seconds - first, *lengths))
    return items


def read_mooncake(path: Path, seed: int = 0) -> list[WorkItem]:
    """Read JSONL with ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids`` (one
    id for every 512 prompt tokens).

    Time stamps in the file are rounded down to three seconds, which would replay as bursts that
    never happened. Each is moved by a random part of three seconds, drawn by ``seed``.
    """
    rng = generator(seed)
    items = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: not JSON ({error})") from None
        for column in ("timestamp", "input_length", "output_length", "hash_ids"):
            if not isinstance(row, dict) or column not in row:
                raise BadInput(f"{path}, line {number}: {column} is missing")
        prompt, output = (
            _count(path, number, column, row[column])
            for column in ("input_length", "output_length")
        )
        at = _count(path, number, "timestamp", row["timestamp"], minimum=0, maximum=10**15) / 1000
        ids = row["hash_ids"]
        if not isinstance(ids, list) or len(ids) != -(-prompt // MOONCAKE_BLOCK):
            raise BadInput(
                f"{path}, line {number}: hash_ids must list one id for every {MOONCAKE_BLOCK} of "
                f"{prompt} prompt tokens"
            )
        ids = tuple(_count(path, number, "hash_ids", i, minimum=0, maximum=2**63 - 1) for i in ids)
        items.append(
            WorkItem(at + rng.random() * MOONCAKE_BUCKET_S, prompt, output, ids, MOONCAKE_BLOCK)
        )
    first = min(item.arrived_at for item in items)
    spread = [replace(item, arrived_at=item.arrived_at - first) for item in items]
    return sorted(spread, key=lambda item: item.arrived_at)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a trace that are not blank, with their numbers. Raises `BadInput` for a file without
    requests and for a line that is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read trace {path}: {error.strerror}") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    if sum(bool(line.strip()) for line in lines) <= (path.suffix.lower() == ".csv"):
        raise BadInput(f"{path}: the file holds no requests")
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise BadInput(f"{path}, line {number}: not UTF-8") from None
        if text.strip():
            yield number, text


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file with their line numbers; one line is one row."""
    for number, line in _lines(path):
        try:
            yield number, next(csv.reader([line]))
        except csv.Error as error:
            raise BadInput(f"{path}, line {number}: not CSV ({error})") from None


def _number(text: str) -> object:
    """``text`` as an int if it is plain digits, else unchanged: an error message quotes it."""
    text = text.strip()
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else text


def _count(
    path: Path, number: int, column: str, value: object, minimum: int = 1, maximum: int = MAX_TOKENS
) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise BadInput(
            f"{path}, line {number}: {column} must be a whole number from {minimum} to {maximum}, "
            f"not {shown(value)}"
        )
    return value


def _seconds(path: Path, number: int, stamp: str) -> float:
    """Seconds since the epoch of a time stamp with a resolution of 100 ns. It is taken as UTC: only
    differences between time stamps are used.
    """
    whole, _, fraction = stamp.strip().partition(".")
    try:
        return datetime.fromisoformat(whole + "+00:00").timestamp() + (
            int(fraction) / 10 ** len(fraction) if fraction else 0
        )
    except (ValueError, OverflowError):
        raise BadInput(
            f"{path}, line {number}: TIMESTAMP must read like 2023-11-16 18:15:46.6805900, not "
            f"{shown(stamp)}"
        ) from None
