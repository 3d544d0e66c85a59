"""The trace formats that are read, told by their columns."""

from itertools import chain

from ..errors import BadInput
from .trace_csv import read_csv
from .trace_jsonl import read_jsonl
from .trace_rows import Lines, Trace

FORMATS = {  # format -> its columns
    "Azure 2023 and 2024 (CSV)": "TIMESTAMP (date and time; UTC where it names no zone), "
    "ContextTokens, GeneratedTokens",
    "BurstGPT (CSV)": "Timestamp (seconds), Request tokens, Response tokens, with or without "
    "Session ID and Elapsed time",
    "Vidur, Sarathi (CSV)": "arrived_at (seconds; without it all arrive at 0), num_prefill_tokens, "
    "num_decode_tokens",
    "Splitwise's simulator (CSV)": "arrival_timestamp (seconds), prompt_size, token_size",
    "Mooncake (JSONL)": "timestamp (ms), input_length, output_length; hash_ids: an id for 512 "
    "tokens (or --trace-block) and all before them",
    "AIPerf (JSONL)": "Mooncake's; a later turn of a session_id may have a delay (ms) after the "
    "turn before arrived, in place of a timestamp",
    "vLLM timed_trace (JSONL)": "Mooncake's with an id for 16 tokens and timestamp in ms, or in "
    "seconds where some have fractions or the mean gap is under 1 ms otherwise",
    "Bailian (JSONL)": "chat_id, parent_chat_id, timestamp (seconds), input_length, output_length, "
    "type, turn; hash_ids: an id for 16 tokens, of their content alone",
}


def read(name: str, lines: Lines, limit: int | None, seed: int, block: int | None) -> Trace:
    """The first ``limit`` requests of a file, sorted among themselves. ``seed`` spreads Mooncake's
    time stamps; ``block``: prompt tokens for each hash id.
    """
    number, text = next(lines, (0, ""))
    if not text:
        raise BadInput(f"{name}: the file holds no requests")
    lines = chain([(number, text)], lines)
    if text[0] in "{[" or name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        return read_jsonl(name, lines, limit, seed, block)
    return read_csv(name, lines, limit)
