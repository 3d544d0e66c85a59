"""Traces by name: a file of any format of `trace_formats`, standard input, or a known public trace
that was saved on this machine.
"""

import contextlib
import os
from contextlib import closing
from pathlib import Path

from ..errors import BadInput, a_path, at_least, shown
from ..host.paths import cache_folder
from .synthetic import WorkItem, generator
from .trace_files import lines_of
from .trace_formats import read
from .trace_rows import Trace

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
STANDARD_INPUT = "-"
SUFFIXES = (".csv", ".jsonl", ".gz", ".zst")


def load_trace(
    name: str, seed: int = 0, num_requests: int | None = None, trace_block: int | None = None
) -> list[WorkItem]:
    """Requests of a trace in order of arrival: `read_trace` without what is said of it."""
    return read_trace(name, seed, num_requests, trace_block).items


def read_trace(
    name: str, seed: int = 0, num_requests: int | None = None, trace_block: int | None = None
) -> Trace:
    """A trace: ``name`` is a file, a name of `KNOWN`, or ``-`` for standard input.

    ``num_requests``: only the first ones of the file, sorted among themselves; lines behind them
    are not read. ``seed`` spreads time stamps that are rounded to buckets. ``trace_block``: prompt
    tokens for each hash id, where the format does not say.
    """
    for given, value in (("num_requests", num_requests), ("trace_block", trace_block)):
        if value is not None:
            at_least(given, value, 1)
    generator(seed)  # refuses a negative one, whether or not it is used
    is_standard_input = isinstance(name, str) and name == STANDARD_INPUT
    path = None if is_standard_input else find_trace(name)
    shown_as = "standard input" if path is None else str(path)
    with closing(lines_of(path, shown_as)) as lines:
        return read(shown_as, lines, num_requests, seed, trace_block)


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
    if not isinstance(name, str) or name not in KNOWN:
        path = Path(name := a_path("trace", name))
        if name == STANDARD_INPUT:
            raise BadInput("trace '-', standard input, can be read only once: save it as a file")
        if os.path.exists(path) and not os.path.isdir(path):
            return path
        if path.suffix.lower() not in SUFFIXES:
            raise BadInput(
                f"unknown trace {shown(name)}: use one of {', '.join(sorted(KNOWN))}, or a file "
                "(`cortexlab traces` lists the formats)"
            )
        raise BadInput(f"trace file {shown(name)} does not exist")
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
