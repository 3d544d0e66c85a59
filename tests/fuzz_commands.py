"""Command lines and files for `fuzz`. All sizes are small: what is not refused ends in a second."""

import json
import math
import shutil
from functools import cache, partial
from pathlib import Path
from random import Random

import mlx.core as mx
import nbformat
import pandas as pd
import yaml
from fuzz_values import TEXTS, Input, changed, damaged
from mlx.utils import tree_flatten

from cortexlab.cli.main import build_parser, main
from cortexlab.errors import shown
from cortexlab.host.models import load_model
from cortexlab.results import store
from cortexlab.results.sweep import SweepSpec

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
# Options of which a valid value may take long, such as requests a million seconds apart.
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
    write_sources()
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
IDS = [0, 1]
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
    "mooncake.jsonl": [row | {"hash_ids": IDS} for row in ROWS],
    "aiperf.jsonl": [
        {"session_id": "a", "timestamp": 5, "input_length": 20, "output_length": 3},
        {"session_id": "a", "delay": 7.5, "input_length": 40, "output_length": 3},
    ],
    "vllm.jsonl": [
        {"timestamp": i / 2, "input_length": 32, "output_length": 4, "hash_ids": IDS}
        for i in range(3)
    ],
    "bailian.jsonl": [
        {"chat_id": i, "parent_chat_id": i - 1, "timestamp": i / 2, "input_length": 32}
        | {"output_length": 4, "type": "text", "turn": 1, "hash_ids": IDS}
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


def write_sources() -> None:
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
    write_sources()
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
