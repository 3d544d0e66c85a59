"""Generated inputs, most of them valid but for one change: `python tests/fuzz.py --inputs 10000
--seed 1 [--seconds 600] [--kind a_trace] [--only 17]`. A seed gives the same inputs each time.

An input must end within five seconds in a result, or in a `CortexLabError` of one line; a command
in exit code 0, 1 or 2, with one line on standard error for 2, in nothing but one JSON document on
standard output with ``--json``; and no file of a result that was there may change. ``--only N``
repeats input N of a seed. Prints one block for each way to fail; exit code 1 if there is one.
"""

import cortexlab  # noqa: F401, I001 - first, so that the optimized BLAS is in place before MLX

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fuzz_commands import VALID
from fuzz_inputs import INPUTS, OFTEN_KINDS
from fuzz_values import Input, Own

from cortexlab import CortexLabError
from cortexlab.cli.main import main as run_command

LIMIT_S = 5.0
REPORT = "report.html"  # what `report` may write into a result
WITH_JSON = "bench", "replay", "allocbench", "traces", "doctor"
ASIDE = "trace ", "paged: refused"  # how lines on standard error begin that are no errors


class TooLong(BaseException):
    """An input that took longer than its limit."""


class Wrong(AssertionError):
    """An input that ended as none may."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in the block after ``seconds``, and again where it is caught."""

    def ring(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Captured:
    """Standard output and error as the console script has them, and an empty standard input."""

    def __enter__(self) -> "Captured":
        self._streams = [
            io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
            for _ in range(2)
        ]
        out, err = self._streams
        empty = io.TextIOWrapper(io.BytesIO(), "utf-8")
        self._patch = patch.multiple(sys, stdout=out, stderr=err, stdin=empty)
        self._patch.start()
        return self

    def __exit__(self, *_) -> None:
        self._patch.stop()
        self.out, self.err = (each.buffer.getvalue().decode() for each in self._streams)


def tree(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a folder, but for pages about results."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != REPORT
    }


def make_results(folder: Path) -> None:
    """A bench, a replay and a sweep, which no input may change."""
    out = ["--out", str(folder), "--name"]
    with contextlib.chdir(folder.parent), Captured():
        for name in ("bench", "replay"):
            line = VALID[name][: VALID[name].index("--out")]
            assert run_command([name, *line, *out, name]) == 0
        grid = {"block_size": [16, 32], "strategy": ["paged"], "seed": [1, 2]}
        spec = {"function": "replay", "parameters": {"num_requests": 5}, "grid": grid}
        spec["plot"] = {"x": "block_size", "lines": "strategy"}
        Path("kept.yaml").write_text(json.dumps(spec))
        assert run_command(["sweep", "kept.yaml", *out, "sweep"]) == 0
        shutil.rmtree(folder / "sweep" / "points")


def check(given: Input) -> None:
    """Run an input in the working folder; any exception but the right ones goes on."""
    before, here = tree(Path("copy")), tree(Path())
    with Captured() as said, patch("os.execv"), limited(LIMIT_S):
        code = _ended(given)
    line = given.line or []
    if line:
        _check_command(line, code, said)
    if tree(Path("copy")) != before and "--overwrite" not in line:
        raise Wrong(f"{line[:1]}: a result that was there has changed")
    if line and code == 2 and tree(Path()) != here:
        raise Wrong(f"{line[0]}: files were written, and {said.err}")


def _ended(given: Input) -> object:
    try:
        return given.run()
    except SystemExit as error:
        if given.line is None:
            raise Wrong("ended the process") from error
        return error.code
    except CortexLabError as error:
        if given.line is not None:
            raise
        if not str(error).strip() or len(str(error).splitlines()) > 1:
            raise Wrong(f"an error that is not one line: {error}") from error
    except Own:
        if given.line is not None:
            raise
    except TypeError:
        if not given.misspelt:
            raise
    return None


def _check_command(line: list[str], code: object, said: Captured) -> None:
    if code not in (0, 1, 2):
        raise Wrong(f"exit code {code!r}")
    if "Traceback" in said.err:
        raise Wrong(f"a traceback on standard error: {said.err}")
    if code == 2:
        errors = [each for each in said.err.splitlines() if not each.startswith(ASIDE)]
        if len(errors) != 1 or not errors[0].startswith("cortexlab") or len(errors[0]) > 3000:
            raise Wrong(f"not one line on standard error: {said.err!r}")
    if "--json" in line and line[0] in WITH_JSON and not {"--", "-h", "--help"} & set(line):
        _check_json(code, said.out)


def _check_json(code: int, out: str) -> None:
    if code == 2:
        if out:
            raise Wrong(f"bad input, and on standard output {out[:200]!r}")
        return
    try:
        json.loads(out, parse_constant=lambda name: json.loads("no JSON"))
    except ValueError:
        raise Wrong(f"not one JSON document: {out[:200]!r}") from None


def attempt(
    seed: object, number: int, kept: Path, kind: str | None = None, again: bool = False
) -> tuple | None:
    """Run input ``number`` of ``seed`` in a folder of its own. None, or what is wrong: its place in
    the code, its kind and words, and the traceback.
    """
    rng = random.Random(f"{seed} {number}")
    drawn = rng.choice(OFTEN_KINDS)  # even where it is not used: what is drawn next is the same
    kind = kind or drawn
    with tempfile.TemporaryDirectory() as root:
        place = Path(root, "a", "b")  # a path may lead up
        place.mkdir(parents=True)
        with contextlib.chdir(place), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = INPUTS[kind](rng, kept)
            try:
                check(given)
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except TooLong:
                if not again:  # the machine may have been busy
                    return attempt(seed, number, kept, kind, again=True)
                return f"longer than {LIMIT_S} s", kind, given.words, traceback.format_exc()
            except BaseException as error:
                return _place(error), kind, given.words, traceback.format_exc()
    return None


def _place(error: BaseException) -> str:
    """Where in the package an exception came from, and its type or, of a `Wrong`, its words."""
    frames = [each for each in traceback.extract_tb(error.__traceback__)]
    own = [each for each in frames if f"{os.sep}cortexlab{os.sep}" in each.filename] or frames
    file = own[-1].filename.rpartition(f"{os.sep}cortexlab{os.sep}")[2]
    said = str(error)[:60] if isinstance(error, Wrong) else type(error).__name__
    return f"{file}:{own[-1].lineno} {own[-1].name}: {said}"


@contextlib.contextmanager
def results() -> Iterator[Path]:
    """A folder of results that no input may change."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root).resolve() / "kept"
        folder.mkdir()
        make_results(folder)
        before = tree(folder)
        yield folder
        assert tree(folder) == before, "an input changed a result that was there"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--kind", choices=INPUTS)
    parser.add_argument("--only", type=int, metavar="N", help="one input, by its number")
    given = parser.parse_args()
    started, found = time.perf_counter(), Counter()
    numbers = range(given.inputs) if given.only is None else [given.only]
    with results() as kept:
        for number in numbers:
            if wrong := attempt(given.seed, number, kept, given.kind):
                where, kind, words, told = wrong
                found[where] += 1
                if found[where] == 1:
                    again = f"--seed {given.seed} --only {number} --kind {kind}"
                    print(f"{where}\n  {again}: {words}")
                    last = told.strip().splitlines()[-1]
                    print(told if given.only is not None else f"  {last[:400]}", flush=True)
            if time.perf_counter() - started > given.seconds:
                break
    for where, count in found.most_common():
        print(f"{count:>6} x {where}")
    seconds, wrong = time.perf_counter() - started, sum(found.values())
    print(f"{wrong} wrong up to input {number:,} of seed {given.seed}, {seconds:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
