"""The command ``replay``."""

import argparse
import json
from pathlib import Path

from ..answer import recommendation
from ..errors import BadInput, at_least
from ..options import ReplayOptions
from ..workloads.synthetic import REPLAY_RATE, REPLAY_REQUESTS
from .options import (
    STRATEGIES_HELP,
    add_options,
    add_result,
    add_workload,
    check_counts,
    chosen,
    filled,
    given_arguments,
    numbers_of,
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
    words = STRATEGIES_HELP.replace("mlx-lm, ", "")
    add("--strategies", default=ReplayOptions.strategy, help=words)
    add(
        "--block-size",
        default=str(ReplayOptions.block_size),
        help="slots a block, comma-separated for several; prefix caching wants the trace's own or "
        "a multiple",
    )
    add(
        "--num-blocks",
        default="unlimited",
        help="a number, unlimited, or a percentage of what paged holds at its peak when unlimited",
    )
    add_options(
        parser, ReplayOptions, "growth", "oom_policy", "watermark", "max_batch_size",
        "max_seq_len", "prefix_caching",
        prefix_caching="share prompt blocks by the trace's hashes, least recently used evicted "
        "first",
    )  # fmt: skip
    add(
        "--step-time",
        metavar="FILE",
        help="step_time.json of a bench run (default: 30 ms + 10 us a token + 0.1 ms a sequence)",
    )
    add(
        "--shuffle-lengths",
        action="store_true",
        help="deal prompts and outputs out anew by the seed: is a finding the trace's own?",
    )
    add_workload(parser, REPLAY_REQUESTS, f"{REPLAY_RATE:g}", "trace")
    add_result(parser, "replay")


def run(args: argparse.Namespace) -> tuple[int, str]:
    from ..bench.environment import machine
    from ..replay import StepTime, reference, replay
    from ..workloads.synthetic import shuffled_lengths

    if args.request_rate is None:
        args.request_rate = "trace" if args.trace else REPLAY_RATE
    strategies = strategies_of(args.strategies)
    sizes = numbers_of("block_size", args.block_size)
    block_sizes = [at_least("block_size", size, 1) for size in sizes]
    check_counts(args, requests=1, seed=0)
    options = chosen(args, ReplayOptions)
    target = target_of(args)
    step_time = StepTime.load(args.step_time) if args.step_time else reference
    arriving = workload_of(args, REPLAY_REQUESTS)
    items = arriving(None)
    if args.shuffle_lengths:
        if args.prefix_caching:
            raise BadInput(
                "shuffle_lengths deals prompts out anew, so there is no prefix left to cache"
            )
        items = shuffled_lengths(items, args.seed)
    with progress_bar(len(strategies) * len(block_sizes), "row") as advance:
        done = replay(
            items, strategies, block_sizes=block_sizes, num_blocks=args.num_blocks,
            step_time=step_time, progress=lambda each: advance(1, each.row["strategy"]), **options,
        )  # fmt: skip
    rows, where = [each.row for each in done], machine()
    advice = recommendation(rows)
    text = json.dumps({"environment": where, "rows": rows}, allow_nan=False)
    _write(target, args, done, where, step_time, advice, arriving.trace)
    code = 1 if any(row["failed"] for row in rows) else 0
    return code, text if args.json else _report(args, rows, len(items), advice, target)


def _write(
    target: Path,
    args: argparse.Namespace,
    done,
    where: dict,
    step_time,
    advice: str,
    trace: dict | None,
) -> None:
    from ..replay import tables
    from ..results import store

    plots = store.drawing()
    frames = tables(done)
    run = {"command": "replay", "arguments": given_arguments(args), "environment": where}
    run |= {"recommendation": advice, "trace": trace}
    run |= {"step_time": json.loads(step_time.to_json())}
    with store.written_atomically(target, args.overwrite) as folder:
        store.write_tables(folder, run, **frames)
        save_figures(folder, plots.replay_figures(frames["rows"], frames["steps"]))


def _report(
    args: argparse.Namespace, rows: list[dict], num_requests: int, advice: str, target: Path
) -> str:
    from ..results.console import replay_table

    head = (
        f"{source_of(args)}, {num_requests} requests, at most {args.max_batch_size} at once, pool: "
        f"{args.num_blocks}; times are the virtual clock's"
    )
    lines = [filled(head), replay_table(rows, terminal_width()), "", filled(advice)]
    for row in rows:
        which = f"{row['strategy']}, blocks of {row['block_size']}"
        if row["refused"]:
            lines.append(
                f"{which}: {row['refused']} requests can never fit its pool or --max-seq-len."
            )
        if row["failed"]:
            lines.append(f"{which}: {row['failed']} requests FAILED for want of memory.")
    made = f"Figures and tables: {target}/ (`cortexlab report {target}` makes a page)"
    return "\n".join([*lines, "", made])
