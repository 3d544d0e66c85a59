"""The command ``bench``."""

import argparse
import json
from pathlib import Path

from ..answer import AUTO, LOOKS, SECONDS, WITHIN
from ..errors import BadInput, a_number
from ..options import BENCH_BATCH_SIZE, BENCHED, MLX_LM, EngineOptions
from .options import (
    DEFAULT_REQUESTS,
    STRATEGIES_HELP,
    add_options,
    add_result,
    add_workload,
    check_counts,
    chosen,
    filled,
    given_arguments,
    progress_bar,
    save_figures,
    source_of,
    strategies_of,
    target_of,
    terminal_width,
    workload_of,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny, a local folder, or a Hub repository")
    add(
        "--strategies",
        help=f"{STRATEGIES_HELP} (default: {','.join(BENCHED)}; without static, which cannot "
        "share, for --prefix-caching)",
    )
    add_options(parser, EngineOptions, "block_size")
    add(
        "--num-blocks",
        help="blocks in the pool, or a percentage of what a full batch can ever use, at least one "
        "region of static (default: 100%%)",
    )
    text = "requests run at once, for every strategy and for mlx-lm"
    add("--batch-size", type=int, default=BENCH_BATCH_SIZE, help=text)
    add_workload(parser, DEFAULT_REQUESTS, "inf")
    add_options(
        parser, EngineOptions, "prefix_caching", "oom_policy", "preemption", "watermark",
        "max_step_tokens", "attention",
        prefix_caching="share equal prefixes of prompts; mlx-lm is given its own prompt cache",
    )  # fmt: skip
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let every request yield all of its max_tokens",
    )
    add_options(
        parser, EngineOptions, "max_seq_len",
        max_seq_len="longest request, and the region of static (default: the longest as a power of "
        "two, at most the model's context)",
    )  # fmt: skip
    add(
        "--repeats",
        type=_repeats,
        default=1,
        help="runs of every strategy, in turn, or auto: until every two are told apart or equal "
        f"within {WITHIN}, at most {LOOKS[-1]}".replace("%", "%%"),
    )
    text = f"after which --repeats auto starts no more of them (default: {SECONDS:g})"
    add("--seconds", type=float, help=text)
    add_result(parser, "bench")


def _repeats(text: str) -> int | str:
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        wanted = f"must be a whole number or {AUTO}, not {text!r}"
        raise argparse.ArgumentTypeError(wanted) from None


def _time_limit(args: argparse.Namespace) -> float:
    """Seconds of ``--repeats auto``; `BadInput` for repeats and seconds that do not go together."""
    if args.repeats != AUTO:
        check_counts(args, repeats=1)
        if args.seconds is not None:
            raise BadInput("--seconds is for --repeats auto")
    return SECONDS if args.seconds is None else a_number("seconds", args.seconds, low=0)


def run(args: argparse.Namespace) -> tuple[int, str]:
    default = ",".join(name for name in BENCHED if name != "static" or not args.prefix_caching)
    given = default if args.strategies is None else args.strategies
    strategies = strategies_of(given, others=(MLX_LM,))
    check_counts(args, block_size=1, batch_size=1, requests=1, seed=0)
    limit = _time_limit(args)
    engine = chosen(args, EngineOptions, max_batch_size=args.batch_size)
    del engine["max_seq_len"], engine["prefix_caching"]  # the setting's own
    target = target_of(args)
    make_items = workload_of(args, DEFAULT_REQUESTS)

    from ..bench.environment import environment
    from ..bench.serve import Setting, run_bench
    from ..bench.summary import recommendation
    from ..host.models import load_model, model_limits

    setting = Setting(
        args.block_size, args.num_blocks, args.batch_size, args.max_seq_len, args.ignore_eos,
        args.seed, args.prefix_caching, engine,
    )  # fmt: skip
    model, tokenizer = load_model(args.model)
    items = make_items(model_limits(model)[0])
    stops = () if tokenizer is None else tuple(tokenizer.eos_token_ids)
    total = sum(item.output_tokens for item in items) * len(strategies)
    with progress_bar(None if args.repeats == AUTO else total * args.repeats) as advance:
        bench = run_bench(
            model, items, strategies, setting, repeats=args.repeats, seconds=limit,
            stop_token_ids=stops, progress=advance,
        )  # fmt: skip
    where, advice = environment(), recommendation(bench)
    document = {"environment": where, "rows": bench.rows, "ratios": bench.ratios}
    document["differences"] = bench.comparison.as_dict() | {"looks": bench.looks}
    text = json.dumps(document, allow_nan=False)
    _write(target, args, bench, document, advice, make_items.trace)
    code = 0 if bench.held else 1
    return code, text if args.json else _report(args, bench, where, advice, target)


def _write(
    target: Path, args: argparse.Namespace, bench, document: dict, advice: str, trace: dict | None
) -> None:
    import pandas as pd

    from ..results import store

    plots = store.drawing()
    tables = {"rows": pd.DataFrame(bench.rows)}
    tables |= {"requests": bench.requests(), "steps": bench.steps()}
    run = {"command": "bench", "arguments": given_arguments(args)}
    run |= {"recommendation": advice, "trace": trace}
    run |= {name: document[name] for name in ("environment", "ratios", "differences")}
    with store.written_atomically(target, args.overwrite) as folder:
        store.write_tables(folder, run, **tables)
        if fitted := bench.step_time():
            step_time, quality = fitted
            (folder / "step_time.json").write_text(step_time.to_json(model=args.model, **quality))
        save_figures(folder, plots.bench_figures(**tables))


def _report(args: argparse.Namespace, bench, where: dict, advice: str, target: Path) -> str:
    from ..results.console import bench_table, difference_table

    repeats = bench.comparison.repeats
    blocks = next((row["num_blocks"] for row in bench.rows if row["num_blocks"]), None)
    pool = f", pool of {blocks} blocks of {args.block_size}" if blocks else ""
    head = (
        f"{args.model} on {where['device']} ({where['blas']}), {source_of(args)}, "
        f"batch {args.batch_size}{pool}, {repeats} repeat{'s' * (repeats != 1)}"
    )
    table = bench_table(bench.rows, terminal_width())
    lines = [filled(head), table, "", filled(advice)]
    if bench.comparison.differences:
        lines += ["", difference_table(bench.comparison), ""]
    if refused := max(row["refused"] for row in bench.rows):
        total = refused + len(bench.runs[0].requests)
        lines.append(
            f"{refused} of {total} requests were refused, and left out for all strategies."
        )
    if not bench.held:
        lines.append(
            "SOMETHING DID NOT HOLD: a request failed, or its tokens are not the model's own "
            "(column `same`)."
        )
    lines.append(f"Figures and tables: {target}/")
    lines.append(f"Next: `make lab` opens the notebooks; `cortexlab report {target}` makes a page.")
    return "\n".join(lines)
