"""Readers for real traces: Azure's CSV and Mooncake's JSONL. What is wrong with a file is named
with its line.
"""

import contextlib
import csv
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from ..errors import BadInput, shown
from ..host.paths import cache_folder
from .synthetic import WorkItem, generator

KNOWN = {  # name -> (file, where to get it)
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
MAX_TOKENS = 10_000_000  # a request longer than this is a broken file, not a request
MOONCAKE_BUCKET_S = 3.0  # its time stamps are rounded down to this
MOONCAKE_BLOCK = 512


def load_trace(name: str, seed: int = 0) -> list[WorkItem]:
    """The trace in a file, or a known name looked up in ``$CORTEXLAB_TRACES`` and the user's cache.
    In order of arrival.
    """
    path = find_trace(name)
    return read_azure(path) if path.suffix.lower() == ".csv" else read_mooncake(path, seed)


def known_here() -> list[str]:
    """Known names whose file is on this machine."""
    found = []
    for name in KNOWN:
        with contextlib.suppress(BadInput):
            found += [name] if find_trace(name) else []
    return found


def find_trace(name: str) -> Path:
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
        "CORTEXLAB_TRACES to its folder)"
    )


def read_azure(path: Path) -> list[WorkItem]:
    """``TIMESTAMP,ContextTokens,GeneratedTokens``; times count from the first row."""
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
    """``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` (one for every 512
    prompt tokens).

    The time stamps lie in buckets of three seconds; replayed as they are they make bursts that
    never happened. They are spread evenly at random inside their bucket, by ``seed``.
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
    spread = [
        WorkItem(
            i.arrived_at - first, i.prompt_tokens, i.output_tokens, i.prefix_ids, i.prefix_block
        )
        for i in items
    ]
    return sorted(spread, key=lambda item: item.arrived_at)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, checked to be UTF-8; `BadInput` when there is nothing
    behind the header.
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
    """Numbered rows of a CSV file, one a line."""
    for number, line in _lines(path):
        try:
            yield number, next(csv.reader([line]))
        except csv.Error as error:
            raise BadInput(f"{path}, line {number}: not CSV ({error})") from None


def _number(text: str) -> object:
    """A whole number in plain digits; anything else stays the text it is, for the message."""
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
    """A time stamp with up to 100 ns, as seconds since the epoch (its zone does not matter: only
    differences are used).
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
