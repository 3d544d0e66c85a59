"""Inputs for `fuzz`: command lines, files and arguments, most of them valid but for one change.

`INPUTS` has a function for each kind of input. It takes a `random.Random` and the folder of the
results that must stay as they are, writes the files that it needs into the working folder, and
returns an `Input`. All sizes are small: what is not refused ends in a second.
"""

import cortexlab as cl  # noqa: I001 - first, so that the optimized BLAS is in place before MLX

import gzip
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from random import Random

import mlx.core as mx
import nbformat
import numpy as np
import pandas as pd
import yaml
from mlx.utils import tree_flatten

from cortexlab.allocators import STRATEGIES
from cortexlab.bench.serve import Setting, run_bench
from cortexlab.cli.main import build_parser, main
from cortexlab.engine.model_runner import ModelRunner
from cortexlab.errors import shown
from cortexlab.host.models import load_model
from cortexlab.options import EngineOptions, ReplayOptions, RequestOptions
from cortexlab.replay import Replay, StepTime, replay
from cortexlab.results import store
from cortexlab.results.sweep import SweepSpec
from cortexlab.workloads.synthetic import (
    LENGTHS,
    WorkItem,
    conversations,
    make_workload,
    shuffled_lengths,
    with_arrivals,
)
from cortexlab.workloads.traces import load_trace


@dataclass(frozen=True, slots=True)
class Input:
    """One input: ``words`` to repeat it by hand, and what runs it."""

    words: str
    run: Callable[[], object]
    line: list[str] | None = None  # of a command
    misspelt: bool = False  # a keyword that does not exist: a TypeError is right


# --- values, and one change of a valid input ------------------------------------------------------

TEXTS = (
    *("", " ", "0", "-1", "1", "1.5", "3", "nan", "inf", "-inf", "1e400", "1e308", "2147483648"),
    *("9" * 5000, "true", "None", "[]", "{}", "é日本", "\udcff", "a\nb", "\0", "a\0b", "٣", "²"),
    *("../up", "/dev/null", "/proc/no", ".", "..", "~", "x" * 300, "-", "--", "-x", "--json", "%s"),
    *("1,2", ",", "16,", "16,x", "50%", "0%", "1e9%", "%", "static,static", "a:b", "os:getcwd"),
    *("cortexlab.allocators:Paged", "json:", ":", "=", "*", "{0}", "unlimited", "auto", "trace"),
)
PLAIN = (  # values that a file can hold
    *(None, True, False, 0, -1, 1, 3, 1.5, -0.0, 2**31, 2**63, 2**64, 10**400, 1e308),
    *(math.nan, math.inf, -math.inf, [], {}, [None], [[]], {"a": [1]}, [1, "a"], *TEXTS),
)


class Own(Exception):
    """An error of a function that the caller gave."""


class Mute:
    def __repr__(self):
        raise RuntimeError("no words")

    def __eq__(self, other):
        raise RuntimeError("like nothing")


def raising(*given, **more):
    raise Own("the caller's\nown")


def _odd() -> tuple:
    """Values that only a caller of the library can give."""
    return (
        *(b"bytes", (), set(), range(3), object(), Decimal("NaN"), Fraction(1, 2), 1j, raising),
        *(np.nan, np.int64(3), np.float32(2), np.array([]), np.array([1, 2]), np.array(3)),
        *(np.array("a"), mx.array(2), mx.array([1.5, 2.5]), mx.zeros((0,)), pd.NA, pd.NaT),
        *(lambda *given, **more: 1, iter([1]), [object()], "paged", "static", ["paged"], Mute()),
    )


def value(rng: Random) -> object:
    return rng.choice(PLAIN) if rng.random() < 0.6 else rng.choice(_odd())


def changed(rng: Random, given: object, new: Callable[[Random], object] | None = None) -> object:
    """A copy of nested dicts and lists with one node replaced, left out, added or wrapped."""
    new = new or (lambda rng: rng.choice(PLAIN))
    if isinstance(given, dict | list) and given and rng.random() < 0.85:
        copy = given.copy()
        key = rng.choice([*copy]) if isinstance(copy, dict) else rng.randrange(len(copy))
        how = rng.random()
        if how < 0.75:
            copy[key] = changed(rng, copy[key], new)
        elif how < 0.9:
            del copy[key]
        elif isinstance(copy, dict):
            copy[rng.choice(("more", "", "é", " x", key.upper()))] = new(rng)
        else:
            copy.insert(key, new(rng))
        return copy
    return [given] if rng.random() < 0.1 else new(rng)


def damaged(rng: Random, data: bytes) -> bytes:
    """The bytes of a file with one piece cut off, put in, doubled or packed."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    junk = rng.choice((b"\0", b"\xff\xfe", b'"', b"\r", b"\n\n", b"{", b"]", b",", b"&a *a"))
    pieces = [b"", data[:at], data[:at] + data[to:], data[:at] + junk + data[at:]]
    pieces += [data[:at] + junk + data[to:], data + data, b"\xef\xbb\xbf" + data]
    pieces += [data.decode(errors="replace").encode("utf-16"), data.replace(b"\n", b"\r")]
    pieces += [gzip.compress(data)[: max(1, at)], b"\x1f\x8b" + data, b"\x28\xb5\x2f\xfd" + data]
    return rng.choice([*pieces, rng.randbytes(50)])


def call(rng: Random, function: Callable, given: dict, *, free: bool = False) -> Input:
    """A call with one argument changed, misspelt or added; ``free``: more than one, or none."""
    given, misspelt = dict(given), False
    for _ in range(rng.choice((0, 2, 3)) if free else 1):
        name = rng.choice([*given])
        if rng.random() < 0.05:
            misspelt = True
            given[name + rng.choice(("s", "_"))] = given.pop(name)
        else:
            given[name] = changed(rng, given[name], value) if rng.random() < 0.3 else value(rng)
    said = ", ".join(f"{name}={shown(given[name])}" for name in given)
    name = getattr(function, "__qualname__", None) or function.func.__qualname__
    return Input(f"{name}({said})", partial(function, **given), misspelt=misspelt)


# --- command lines --------------------------------------------------------------------------------

SMALL = "--requests 3 --seed 1 --out out --name new"
BENCH = "--model tiny --workload lognormal --scale-lengths 0.05 --strategies paged --num-blocks 9%"
VALID = {
    "bench": f"{BENCH} --batch-size 2 {SMALL}".split(),
    "replay": f"--strategies paged,static --block-size 16 {SMALL}".split(),
    "allocbench": ["--strategies", "paged", "--num-blocks", "64", "--request-blocks", "2"],
    "traces": ["azure.csv", "--requests", "2"],
    "sweep": ["sweep.yaml", "--out", "out", "--name", "new"],
    "compare": ["replay", "bench", "--out", "kept"],
    "report": ["replay", "--out", "copy"],
    "doctor": ["--jason"],
    "lab": ["--port", "8889"],
    "fetch-model": ["more"],
}
OFTEN = ("replay", "bench", "sweep", "traces", "allocbench", "report", "compare", *VALID)
# Real work: an hour's examination, a download, requests that come once in a million seconds.
ENDLESS = {"--dask", "--help", "-h", "--version", "--request-rate", "--repeats", "--seconds"}


@cache
def options_of(command: str) -> list[str]:
    """Names of the options of a command."""
    commands = next(action for action in build_parser()._actions if action.choices)
    actions = commands.choices[command]._actions
    return sorted(name for action in actions for name in action.option_strings)


def command(line: list[str], words: str = "") -> Input:
    return Input(f"main({line!r}){words}", partial(main, line), line)


def a_command(rng: Random, kept: Path) -> Input:
    """A command line with one word changed, left out, doubled or added."""
    name = rng.choice(OFTEN)
    line = VALID[name].copy()
    _write_sources()
    shutil.copytree(kept, "copy")
    Path("kept").symlink_to(kept)
    options = [option for option in options_of(name) if option not in ENDLESS]
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2)) if name not in ("doctor", "fetch-model") else 0):
        at, how = rng.randrange(len(line)), rng.random()
        if how < 0.5:
            values = [i for i, word in enumerate(line) if not word.startswith("--")]
            line[rng.choice(values or [0])] = rng.choice(TEXTS)
        elif how < 0.6:
            line[at] += rng.choice(TEXTS)
        elif how < 0.7 and len(line) > 1:
            del line[at]
        elif how < 0.9 and options:
            line += [rng.choice(options), rng.choice(TEXTS)][: rng.choice((1, 2, 2, 2))]
        else:
            line.insert(at, rng.choice(TEXTS))
    if name in ("bench", "replay", "sweep") and rng.random() < 0.1:  # a name in use
        line += ["--out", "copy", "--name", rng.choice(("bench", "replay"))]
    if name in ("bench", "replay", "allocbench", "traces") and rng.random() < 0.3:
        line.append("--json")
    if name in ("bench", "allocbench"):  # the defaults are large: a later option wins
        line = [*VALID[name], *line]
    if name in ("doctor", "fetch-model"):
        line += rng.sample([text for text in TEXTS if text not in ("--", "--json")], 1)
    return command([name, *line])


def a_rare_option(rng: Random, kept: Path) -> Input:
    """A bench or a replay with an option whose every value could take long, and a wrong one."""
    name = rng.choice(("bench", "replay"))
    wrong = ("", "0", "-1", "nan", "-inf", "1e400", "x", "1.5.", "é", "\0", "9" * 5000, "2**31")
    names = ("--request-rate", "--repeats", "--seconds") if name == "bench" else ("--request-rate",)
    return command([name, *VALID[name], rng.choice(names), rng.choice(wrong)])


# --- files ----------------------------------------------------------------------------------------

ROWS = [{"timestamp": 3000 * i, "input_length": 600, "output_length": 5} for i in range(3)]
ids = [0, 1]
TRACES = {
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    "2023-11-16 18:15:51.2,879,55\n",
    "azure24.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.017335+00:00,2399,6\n",
    "burst.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,230,1317,Conversation log\n",
    "vidur.csv": "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,100,20\n1.25,30,4\n",
    "untimed.csv": "num_prefill_tokens,num_decode_tokens\n100,20\n30,4\n",
    "splitwise.csv": "request_id,arrival_timestamp,prompt_size,token_size\n0,0.1,80,9\n1,0.2,7,8\n",
    "mooncake.jsonl": [row | {"hash_ids": ids} for row in ROWS],
    "aiperf.jsonl": [
        {"session_id": "a", "timestamp": 5, "input_length": 20, "output_length": 3},
        {"session_id": "a", "delay": 7.5, "input_length": 40, "output_length": 3},
    ],
    "vllm.jsonl": [
        {"timestamp": i / 2, "input_length": 32, "output_length": 4, "hash_ids": ids}
        for i in range(3)
    ],
    "bailian.jsonl": [
        {"chat_id": i, "parent_chat_id": i - 1, "timestamp": i / 2, "input_length": 32}
        | {"output_length": 4, "type": "text", "turn": 1, "hash_ids": ids}
        for i in range(3)
    ],
}
SWEEP = {
    "function": "replay",
    "parameters": {"workload": "lognormal", "num_requests": 5},
    "grid": {"block_size": [16, 32], "strategy": ["paged"]},
    "plot": {"x": "block_size", "lines": "strategy", "y": ["token_share"]},
}
STEP_TIME = {"base_s": 0.01, "token_s": 0.001, "sequence_s": 0.0}
LLAMA = {
    **{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 256},
    **{"max_position_embeddings": 4096, "tie_word_embeddings": False},
}


def _lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_sources() -> None:
    for name, content in TRACES.items():
        Path(name).write_text(content if isinstance(content, str) else _lines(content))
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP))


def _written(rng: Random, name: str, content: str) -> str:
    """Write a file, often damaged; returns how to write it again."""
    data = content.encode("utf-8", "surrogateescape")
    data = damaged(rng, data) if rng.random() < 0.3 else data
    Path(name).write_bytes(data)
    return f"  # {name}: {shown(data, 1500)}"


def a_trace(rng: Random, kept: Path) -> Input:
    name = rng.choice([*TRACES])
    content = TRACES[name]
    if isinstance(content, str):
        cells = [line.split(",") for line in content.splitlines()]
        text = rng.choice(TEXTS)
        cells = changed(rng, cells, lambda rng: text)
        rows = (row if isinstance(row, list) else [str(row)] for row in _listed(cells))
        content = "\n".join(",".join(map(str, row)) for row in rows)
    else:
        content = _lines(_listed(changed(rng, content)))
    words = _written(rng, name, content)
    lines = [["traces", name], ["traces", name, "--trace-block", "16"], ["replay", "--trace", name]]
    lines.append([*lines[-1], "--prefix-caching", "--block-size", "512"])
    return command([*rng.choice(lines), *rng.choice(([], ["--json"]))], words)


def _listed(rows: object) -> list:
    return rows if isinstance(rows, list) else [rows]


def a_sweep(rng: Random, kept: Path) -> Input:
    _write_sources()
    words = _written(rng, "sweep.yaml", yaml.safe_dump(changed(rng, SWEEP), allow_unicode=True))
    return command(["sweep", "sweep.yaml", "--out", "out"], words)


def a_notebook(rng: Random, kept: Path) -> Input:
    cells = [
        nbformat.v4.new_code_cell("size: int = 3\nrows_file: str = ''"),
        nbformat.v4.new_code_cell("print(size)"),
    ]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    notebook = json.loads(nbformat.writes(notebook))
    words = _written(rng, "book.ipynb", json.dumps(changed(rng, notebook)))
    spec = {"notebook": "book.ipynb", "grid": {"size": [3]}}
    Path("book.yaml").write_text(yaml.safe_dump(spec))
    return Input(f"SweepSpec.load({spec}).work(){words}", _load_notebook)


def _load_notebook() -> None:
    SweepSpec.load(Path("book.yaml")).work()


def a_step_time(rng: Random, kept: Path) -> Input:
    words = _written(rng, "step.json", json.dumps(changed(rng, STEP_TIME)))
    return command(["replay", *VALID["replay"], "--step-time", "step.json"], words)


def a_model(rng: Random, kept: Path) -> Input:
    """A folder with a configuration, and weights that are right, missing or damaged."""
    config = changed(rng, LLAMA, lambda rng: rng.choice((None, 0, -1, 3, 1.5, "x", [], {}, True)))
    Path("model").mkdir()
    words = _written(rng, "model/config.json", json.dumps(config))
    weights = rng.choice(("right", "missing", "damaged", "half"))
    if weights != "missing":
        arrays = tree_flatten(load_model("tiny")[0].parameters())
        kept_arrays = arrays[: len(arrays) // 2] if weights == "half" else arrays
        mx.save_safetensors("model/model.safetensors", dict(kept_arrays))
    if weights == "damaged":
        path = Path("model/model.safetensors")
        path.write_bytes(damaged(rng, path.read_bytes()))
    if rng.random() < 0.5:
        return Input(f"load_model('model'), weights {weights}{words}", partial(load_model, "model"))
    return command(["bench", *VALID["bench"], "--model", "model"], f", weights {weights}{words}")


def a_result(rng: Random, kept: Path) -> Input:
    """A folder of results with one file damaged, left out or of another kind."""
    name = rng.choice(sorted(path.name for path in kept.iterdir()))
    shutil.copytree(kept, "copy")
    path = rng.choice(sorted(Path("copy", name).glob("*.*")))
    how = rng.random()
    if path.name == "run.json" and how < 0.7:
        run = changed(rng, json.loads(path.read_text()))
        path.write_text(json.dumps(run), errors="surrogateescape")
        words = f"  # {path}: {shown(run, 1500)}"
    elif path.suffix == ".parquet" and how < 0.7:
        frame, words = pd.read_parquet(path), f"  # {path}:"
        frame, more = _other_table(rng, frame)
        frame.to_parquet(path, index=False)
        words += more
    elif how < 0.8:
        path.unlink()
        words = f"  # without {path}"
    else:
        data = damaged(rng, path.read_bytes())
        path.unlink()
        path.write_bytes(data)
        words = f"  # {path}: {len(data)} bytes, {shown(data, 200)}"
    folder = f"copy/{name}"
    other = f"copy/{rng.choice(sorted(path.name for path in kept.iterdir()))}"
    return rng.choice(
        (
            command(["report", folder], words),
            command(["compare", *rng.sample([folder, other], 2)], words),
            Input(f"read({folder!r}){words}", partial(store.read, folder)),
            Input(f"read_rows('copy'){words}", partial(store.read_rows, "copy")),
        )
    )


def _other_table(rng: Random, frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    column, how = rng.choice([*frame]), rng.randrange(5)
    if how == 0:
        return frame.drop(columns=column), f" without {column}"
    if how == 1:
        return frame.iloc[:0], " without rows"
    if how == 2:
        return frame.rename(columns={column: "other"}), f" {column} named other"
    if how == 3:
        return pd.DataFrame({"a": [1]}), " a: [1]"
    new = rng.choice((None, math.nan, math.inf, -1, "text", [1], {"a": 1}, True, b"x", 2**62))
    return frame.assign(**{column: [new] * len(frame)}), f" {column} is {new!r}"


# --- arguments ------------------------------------------------------------------------------------


@cache
def tiny() -> ModelRunner:
    return ModelRunner(load_model("tiny")[0])


def defaults(kind: type, *without: str) -> dict:
    return {each.name: each.default for each in fields(kind) if each.name not in without}


ENGINE = defaults(EngineOptions) | {"num_blocks": 16, "block_size": 4, "max_batch_size": 2}
REQUEST = defaults(RequestOptions) | {"prompt": [1, 2, 3], "max_tokens": 2, "request_id": "a"}
REPLAY = defaults(ReplayOptions, "num_blocks", "block_size", "strategy") | {"max_batch_size": 4}
CACHE = {
    **{"num_layers": 1, "num_kv_heads": 2, "head_dim": 4, "max_total_tokens": 32, "block_size": 4},
    **{"strategy": "paged", "growth": None, "max_seq_len": 16, "dtype": mx.float32},
}
WORKLOAD = {"name": "chat", "num_requests": 3, "seed": 0, "context": 512} | {
    "request_rate": math.inf, "burstiness": 1.0, "scale_lengths": 1.0
}  # fmt: skip
ITEM = {"arrived_at": 0.0, "prompt_tokens": 20, "output_tokens": 3} | {
    "prefix_ids": (0,), "prefix_block": 16, "max_tokens": None
}  # fmt: skip
ITEMS = [WorkItem(**ITEM), WorkItem(1.0, 30, 5)]


def engine(**options) -> None:
    """Make an engine and let it serve a request."""
    made = cl.Engine(tiny(), **options)
    made.submit([1, 2, 3], 2)
    list(made.run())
    made.stats()


def submit(**options) -> None:
    """Serve a request beside another one."""
    made = cl.Engine(tiny(), num_blocks=32, block_size=4, max_batch_size=2, clock=lambda: 0.0)
    good = made.submit([4, 5], 3)
    made.submit(**options)
    list(made.run())
    assert len(good.output_tokens) == 3, "another request suffered"
    assert made.stats().used_blocks == 0


def cache_of(**options) -> None:
    made = cl.KVCache(**options)
    made.allocate_for("a", 1)
    made.stats()


def in_cache(method: str, **given) -> None:
    """Call a method of a cache that holds the sequence a."""
    made = cl.KVCache(**CACHE)
    made.allocate_for("a", 3)
    try:
        getattr(made, method)(**given)
    finally:
        made.blocks.check()


def in_pool(strategy: str, method: str, **given) -> None:
    """Call a method of an allocator that has handed out three blocks."""
    pool = cl.make_allocator(strategy, 32)
    held = pool.allocate(3)
    if given.get("extents") is HELD:
        given["extents"] = held
    try:
        getattr(pool, method)(**given)
    finally:
        pool.check()


def run_replay(strategy: object, items: object, step_time: object, on_sample: object, **options):
    Replay(strategy, step_time=step_time, on_sample=on_sample, **options).run(items)


def bench(**given) -> None:
    """Benches on the tiny model, with a `Setting` of its own."""
    names = {each.name for each in fields(Setting)}
    setting = Setting(**{name: given.pop(name) for name in names & set(given)})
    run_bench(tiny().model, setting=setting, **given)


KV = {"keys": mx.zeros((2, 1, 4)), "values": mx.zeros((2, 1, 4))}
METHODS = {
    "allocate_for": {"sequence": "b", "num_tokens": 3, "max_tokens": 8},
    "append_token": {"sequence": "a"},
    "write": {"sequence": "a", "layer": 0, "start": 0} | KV,
    "get_k_view": {"sequence": "a", "layer": 0},
    "get_v_views": {"sequence": "a", "layer": 0},
    "used_tokens": {"sequence": "a"},
    "get_token_offset_in_block": {"sequence": "a"},
    "free_for": {"sequence": "a"},
    "extents": {"sequence": "a"},
}
HELD = "the extents in hand"
IN_POOL = {
    "allocate": {"num_blocks": 2},
    "extend": {"extents": HELD, "num_blocks": 1},
    "free": {"extents": HELD},
}
REPLAYS = {"items": ITEMS, "strategies": ["paged", "runs"], "block_sizes": [4, 16]} | {
    "num_blocks": 64, "progress": lambda done: None, "step_time": StepTime(0.01, 0.0, 0.0)
}  # fmt: skip
CALLS: list[tuple[Callable, dict]] = [
    *[(engine, ENGINE)] * 4,
    *[(submit, REQUEST)] * 5,
    *[(cache_of, CACHE)] * 3,
    *[(replay, REPLAYS | REPLAY)] * 5,
    (run_replay, REPLAY | {"items": ITEMS, "strategy": "paged", "step_time": StepTime(1, 0, 0)}
     | {"on_sample": None, "num_blocks": 64}),
    *[(cl.SamplingParams, defaults(cl.SamplingParams))] * 2,
    *[(make_workload, WORKLOAD)] * 2,
    (cl.make_allocator, {"placement": "static", "num_blocks": 32, "region_blocks": 4}),
    (cl.KVBlockAllocator, {"total_blocks": 32, "strategy": "first_fit"}),
    (StepTime, STEP_TIME),
    (StepTime.fit, {"steps": [(0.1, 3, 1), (0.2, 6, 2), (0.3, 9, 2)]}),
    (StepTime.load, {"path": "none.json"}),
    (WorkItem, ITEM),
    (conversations, {"num_conversations": 2, "num_turns": 2, "system_tokens": 32}
     | {"request_rate": 1.0, "pause": 3.0, "unit": 16, "seed": 0}),
    (shuffled_lengths, {"items": ITEMS, "seed": 0}),
    (with_arrivals, {"items": ITEMS, "request_rate": 1.0, "burstiness": 1.0, "seed": 0}),
    (load_trace, {"name": "azure.csv", "seed": 0, "num_requests": 2, "trace_block": 16}),
    (load_model, {"name": "tiny", "seed": 0}),
    (bench, defaults(Setting, "engine") | {"items": ITEMS, "strategies": ["paged"], "engine": {}}
     | {"num_blocks": "100%", "stop_token_ids": (), "progress": lambda tokens, strategy: None}),
]  # fmt: skip


def a_call(rng: Random, kept: Path) -> Input:
    _write_sources()
    return call(rng, *rng.choice(CALLS), free=rng.random() < 0.15)


def a_method(rng: Random, kept: Path) -> Input:
    if rng.random() < 0.6:
        method = rng.choice([*METHODS])
        return call(rng, partial(in_cache, method), METHODS[method])
    method, strategy = rng.choice([*IN_POOL]), rng.choice([*STRATEGIES])
    return call(rng, partial(in_pool, strategy, method), IN_POOL[method])


def a_workload(rng: Random, kept: Path) -> Input:
    """A workload with valid arguments at the ends of their ranges."""
    given = WORKLOAD | {"name": rng.choice([*LENGTHS]), "num_requests": rng.choice((1, 2, 50))}
    given |= {"context": rng.choice((None, 1, 2, 2**31 - 1)), "seed": rng.choice((0, 2**31 - 1))}
    given |= {"request_rate": rng.choice((1e-6, 1e300, math.inf))}
    given |= {"burstiness": rng.choice((1e-300, 1e-9, 1e300))}
    return call(rng, make_workload, given)


INPUTS = {
    each.__name__: each
    for each in (
        a_command, a_call, a_method, a_trace, a_result, a_sweep, a_rare_option, a_notebook,
        a_step_time, a_model, a_workload,
    )
}  # fmt: skip
OFTEN_KINDS = (
    *["a_call"] * 6, *["a_command"] * 4, *["a_trace"] * 3, *["a_result"] * 3, *["a_sweep"] * 2,
    *["a_method"] * 2, *INPUTS,
)  # fmt: skip
