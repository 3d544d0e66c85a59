"""Lines of a trace file, plain or packed by gzip or Zstandard (told by its first bytes), or of
standard input. A line is read when it is asked for.
"""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import BadInput, reason_of

GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # first bytes of a packed file
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def lines_of(path: Path | None, name: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers; ``path`` None: of standard input. Raises
    `BadInput` with ``name`` where the file cannot be read or unpacked, or a line is not UTF-8.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                try:
                    text = line.decode().strip()
                except UnicodeDecodeError:
                    raise BadInput(f"{name}, line {number}: not UTF-8") from None
                if text:
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise BadInput(f"cannot read trace {name}: {reason}") from error


@contextmanager
def _opened(path: Path | None) -> Iterator[BinaryIO]:
    if path is None:
        stream = sys.stdin.buffer
        yield _unpacked(stream if hasattr(stream, "peek") else io.BufferedReader(stream))
    else:
        with path.open("rb") as file:
            yield _unpacked(file)


def _unpacked(file: io.BufferedReader) -> BinaryIO:
    first = file.peek(len(ZSTANDARD))
    if first.startswith(GZIP):
        return gzip.GzipFile(fileobj=file)
    if first.startswith(ZSTANDARD):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return file
