"""The command line. Exit codes: 0 done; 1 done, but something did not hold; 2 bad input (one line
on standard error).
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import textwrap
from importlib import import_module, metadata
from pathlib import Path

from ..allocators import GROWTHS, STRATEGIES, make_allocator
from ..bench import allocator_cost as allocbench
from ..errors import BadInput, CortexLabError, ModelError, at_least, one_of, shown
from ..scheduler.scheduler import OOM_POLICIES, PREEMPTIONS, WATERMARK

NOTEBOOKS, EXPERIMENTS = Path("notebooks"), Path("experiments")
DEFAULT_REQUESTS = 16
BENCHED = ("static", "cortexstream", "paged", "runs", "mlx-lm")
REPLAY_REQUESTS, REPLAY_RATE = 5000, 5.0  # of a workload; requests per second
STRATEGIES_HELP = f"comma-separated: {', '.join(STRATEGIES)}, mlx-lm, or module:Factory of your own"


class Parser(argparse.ArgumentParser):
    """Bad usage is bad input: one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command is not run_lab:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = [option for option in rest if option != "--"]
    args.stdout = sys.stdout
    try:
        with (
            contextlib.redirect_stdout(sys.stderr)
            if getattr(args, "json", False)
            else contextlib.nullcontext()
        ):
            return args.command(args)
    except CortexLabError as error:
        print(f"{parser.prog} {args.name_of_command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = (
            "what is finished is kept, the same command goes on"
            if args.command is run_sweep
            else "nothing was written"
        )
        print(f"interrupted: {kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cortexlab ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser() -> Parser:
    parser = Parser(
        prog="cortexlab",
        description=(
            "How should an LLM's KV cache be laid out and allocated, and what does it cost?"
        ),
    )
    parser.add_argument(
        "--version", action="version", version=f"cortexlab {metadata.version('cortexlab')}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        sub.set_defaults(command=run, name_of_command=name)
        return sub

    doctor = command(
        "doctor", run_doctor, "what this machine is, how fast, and what to do where it falls short"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON document")

    bench = command(
        "bench", run_bench, "run a workload on a real model under each strategy and under mlx-lm"
    )
    add_bench_arguments(bench)

    replay = command(
        "replay",
        run_replay,
        "a workload or an hour of a trace through scheduler and allocators alone, on a virtual "
        "clock",
    )
    add_replay_arguments(replay)

    text = "what bookkeeping costs: microseconds an operation, by strategy and size of pool"
    allocbench.add_arguments(command("allocbench", run_allocbench, text))

    sweep = command(
        "sweep",
        run_sweep,
        "run a notebook or a replay over a grid of parameters and collect the rows; goes on where "
        "it was killed",
    )
    sweep.add_argument(
        "file",
        help=(
            "a YAML file (notebook or function, grid, optionally plot), or the name of one that "
            "came with cortexlab, such as quickstart"
        ),
    )
    sweep.add_argument("--name", help="folder under --out (default: the file's name)")
    sweep.add_argument("--out", default="results", help="where results go")
    sweep.add_argument(
        "--jobs",
        type=int,
        default=1,
        help=(
            "processes, which share the BLAS's threads; times that are measured beside each other "
            "are longer"
        ),
    )
    sweep.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="a Dask scheduler whose workers run the points instead, such as tcp://host:8786",
    )
    sweep.add_argument(
        "--retry", action="store_true", help="run the points again that failed before"
    )

    compare = command(
        "compare",
        run_compare,
        "what differs between two results: settings, machine, figures with their intervals",
    )
    compare.add_argument(
        "first", metavar="RUN", help="a folder of results, or its name under --out"
    )
    compare.add_argument("second", metavar="RUN", help="the other")
    compare.add_argument("--out", default="results", help="where results are")

    report = command(
        "report",
        run_report,
        "one self-contained HTML page of a result: figures, tables, machine, how to reproduce it",
    )
    report.add_argument("of", metavar="NAME", help="a folder of results, or its name under --out")
    report.add_argument("--out", default="results", help="where results are")

    command(
        "fetch-model",
        run_fetch,
        "fetch the embedded model into the user's cache, unless it is there",
    )

    command(
        "lab",
        run_lab,
        "open JupyterLab on the notebooks (copied here where there are none); other options go to "
        "jupyter lab (--no-browser, --port 8889)",
    )
    return parser


def add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    add = bench.add_argument
    add("--model", default="smollm2", help="smollm2, tiny, a local folder, or a Hub repository")
    add(
        "--strategies",
        help=(
            f"{STRATEGIES_HELP} (default: {','.join(BENCHED)}; without static, which cannot share, "
            "for --prefix-caching)"
        ),
    )
    add("--block-size", type=int, default=16, help="slots a block")
    add(
        "--num-blocks",
        help=(
            "blocks in the pool, or a percentage of what a full batch can ever use, at least one "
            "region of static (default: 100%%)"
        ),
    )
    add(
        "--batch-size",
        type=int,
        default=8,
        help="requests run at once, for every strategy and for mlx-lm",
    )
    add_workload_arguments(bench, DEFAULT_REQUESTS, "inf")
    add(
        "--prefix-caching",
        action="store_true",
        help="share equal prefixes of prompts; mlx-lm is given its own prompt cache",
    )
    add(
        "--oom-policy", choices=OOM_POLICIES, default="wait", help="what happens when memory is out"
    )
    add(
        "--preemption",
        choices=PREEMPTIONS,
        default="recompute",
        help="whether who gives way is computed again, or swapped to the host",
    )
    add(
        "--watermark",
        type=float,
        default=WATERMARK,
        help="share of the pool that admissions leave free for growth",
    )
    add(
        "--max-step-tokens",
        type=int,
        help="tokens a step computes at most (default: 512): prompts are cut into chunks",
    )
    add(
        "--attention",
        default="auto",
        help="how decoding rows read K and V: auto, views, windows or gather",
    )
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let every request yield all of its max_tokens",
    )
    add(
        "--max-seq-len",
        type=int,
        help="longest request, and the region of static (default: the longest, as a power of two)",
    )
    add(
        "--repeats",
        type=int,
        default=1,
        help="runs of every strategy, in turn; medians and 95 %% intervals are reported",
    )
    add_result_arguments(bench, "bench")


def add_replay_arguments(replay: argparse.ArgumentParser) -> None:
    add = replay.add_argument
    add("--strategies", default="paged", help=STRATEGIES_HELP.replace("mlx-lm, ", ""))
    add(
        "--block-size",
        default="16",
        help=(
            "slots a block, comma-separated for several; prefix caching wants the trace's own or a "
            "multiple"
        ),
    )
    add(
        "--num-blocks",
        default="unlimited",
        help="a number, unlimited, or a percentage of what paged holds at its peak when unlimited",
    )
    add(
        "--growth",
        choices=GROWTHS,
        help="what a sequence does that outgrows its blocks (default: the strategy's own)",
    )
    add(
        "--oom-policy", choices=OOM_POLICIES, default="wait", help="what happens when memory is out"
    )
    add(
        "--watermark",
        type=float,
        default=WATERMARK,
        help="share of the pool that admissions leave free for growth",
    )
    add("--max-batch-size", type=int, default=256, help="requests run at once")
    add(
        "--max-seq-len",
        type=int,
        help="the region of static (default: the longest request, as a power of two)",
    )
    add(
        "--prefix-caching",
        action="store_true",
        help="share prompt blocks by the trace's hashes, least recently used evicted first",
    )
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
    add_workload_arguments(replay, REPLAY_REQUESTS, "5", "trace")
    add_result_arguments(replay, "replay")


def add_workload_arguments(
    parser: argparse.ArgumentParser, requests: int, rate: str, trace_rate: str | None = None
) -> None:
    add = parser.add_argument
    add("--requests", type=int, help=f"how many (default: {requests}, or all of a trace)")
    add("--workload", default="chat", help="chat, lognormal, heavy-tail or shared-prefix")
    add(
        "--trace",
        help=(
            "azure_2023_conv, mooncake_conversation, or a .csv or .jsonl file; takes the place of "
            "--workload"
        ),
    )
    text = "requests per second, inf (all at time 0) or trace (the trace's own times)"
    if trace_rate is None:
        add("--request-rate", type=_rate, default=rate, help=text)
    else:
        add(
            "--request-rate",
            type=_rate,
            help=f"{text} (default: {rate}, or {trace_rate} with a trace)",
        )
    add(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the gamma-distributed gaps: 1 is Poisson, smaller is burstier",
    )
    add(
        "--scale-lengths",
        type=float,
        default=1.0,
        help="multiplies prompt and output lengths, rounded up",
    )
    add("--seed", type=int, default=0, help="of lengths, arrivals and tokens")


def add_result_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument
    add("--name", help=f"folder under --out (default: {command}-<UTC time>)")
    add("--out", default="results", help="where results go")
    add("--overwrite", action="store_true", help="replace a result of that name")
    add("--json", action="store_true", help="print one JSON document and nothing else")


# --- commands -------------------------------------------------------------------------------------


def run_bench(args) -> int:
    from ..results import store as results

    given = args.strategies or ",".join(
        name for name in BENCHED if name != "static" or not args.prefix_caching
    )
    strategies = [_strategy(name.strip()) for name in given.split(",")]
    for name, minimum in (
        ("block_size", 1),
        ("batch_size", 1),
        ("max_step_tokens", args.batch_size),
        ("requests", 1),
        ("repeats", 1),
        ("max_seq_len", 1),
        ("seed", 0),
    ):
        if (value := getattr(args, name)) is not None:
            at_least(name.replace("_", "-"), value, minimum)
    target = results.check_target(
        Path(args.out), args.name or results.default_name("bench"), args.overwrite
    )
    make_items = _workload(args)  # reads and checks a trace before the model is loaded

    from ..bench import serve as benchmarks
    from ..bench.doctor import environment
    from ..host.models import load_model, model_limits

    engine = {
        name: getattr(args, name)
        for name in ("oom_policy", "preemption", "watermark", "max_step_tokens", "attention")
    }
    setting = benchmarks.Setting(
        args.block_size,
        args.num_blocks,
        args.batch_size,
        args.max_seq_len,
        args.ignore_eos,
        args.seed,
        args.prefix_caching,
        engine,
    )
    model, tokenizer = load_model(args.model)
    items = make_items(model_limits(model)[0])
    stops = () if tokenizer is None else tuple(tokenizer.eos_token_ids)
    total = sum(item.output_tokens for item in items) * args.repeats * len(strategies)
    with _progress(total) as advance:
        bench = benchmarks.run_bench(
            model,
            items,
            strategies,
            setting,
            repeats=args.repeats,
            stop_token_ids=stops,
            progress=advance,
        )
    where = environment()
    document = {"environment": where, "rows": bench.rows, "ratios": bench.ratios}
    text = json.dumps(document, allow_nan=False)
    _write_bench(target, args, bench, document)
    if args.json:
        print(text, file=args.stdout)
    else:
        print(_bench_report(args, bench, where, target))
    return 0 if bench.held else 1


def run_replay(args) -> int:
    from ..bench.doctor import machine
    from ..replay.simulation import reference, replay
    from ..replay.step_time import StepTime
    from ..results import store as results
    from ..workloads.synthetic import shuffled_lengths

    if args.request_rate is None:
        args.request_rate = "trace" if args.trace else REPLAY_RATE
    strategies = [_strategy(name.strip(), ()) for name in args.strategies.split(",")]
    block_sizes = [_whole("block-size", text) for text in args.block_size.split(",")]
    for name, minimum in (("requests", 1), ("max_batch_size", 1), ("max_seq_len", 1), ("seed", 0)):
        if (value := getattr(args, name)) is not None:
            at_least(name.replace("_", "-"), value, minimum)
    target = results.check_target(
        Path(args.out), args.name or results.default_name("replay"), args.overwrite
    )
    step_time = StepTime.load(args.step_time) if args.step_time else reference
    items = _workload(args, REPLAY_REQUESTS)(None)
    if args.shuffle_lengths:
        if args.prefix_caching:
            raise BadInput(
                "shuffle-lengths deals prompts out anew, so there is no prefix left to cache"
            )
        items = shuffled_lengths(items, args.seed)
    options = {
        name: getattr(args, name)
        for name in (
            "growth",
            "oom_policy",
            "watermark",
            "max_batch_size",
            "max_seq_len",
            "prefix_caching",
        )
    }
    with _progress(len(strategies) * len(block_sizes), "row") as advance:
        done = replay(
            items,
            strategies,
            block_sizes=block_sizes,
            num_blocks=args.num_blocks,
            step_time=step_time,
            progress=lambda each: advance(1, each.row["strategy"]),
            **options,
        )
    rows, where = [each.row for each in done], machine()
    text = json.dumps({"environment": where, "rows": rows}, allow_nan=False)
    _write_replay(target, args, done, where, step_time)
    if args.json:
        print(text, file=args.stdout)
    else:
        print(_replay_report(args, rows, len(items), target))
    return 1 if any(row["failed"] for row in rows) else 0


def run_allocbench(args) -> int:
    return allocbench.run(args, _strategy)


def run_doctor(args) -> int:
    from ..bench import doctor

    found = doctor.examine()
    print(json.dumps(found) if args.json else doctor.report(found), file=args.stdout)
    return 0 if doctor.can_run(found) else 1


def run_fetch(args) -> int:
    from ..host import models as model

    path = model.find_smollm2()
    with contextlib.suppress(ModelError):  # a damaged file is fetched again
        if path is not None:
            model.check_sha256(path)
            print(f"model: {path}")
            return 0
    print("fetching the model (93 MB) ...", flush=True)
    print(f"model: {model.fetch_smollm2()}")
    return 0


def run_sweep(args) -> int:
    from ..host.paths import shipped
    from ..results import sweep

    file = Path(args.file)
    if not file.exists() and file.name == args.file:
        file = shipped(EXPERIMENTS.name) / f"{file.stem}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(each.stem for each in file.parent.glob("*.yaml")))
            raise BadInput(
                f"there is no file {shown(args.file)} here, and no grid of that name came with "
                f"cortexlab: use a path, or {known}"
            )
    return sweep.run(
        file, Path(args.out), args.name, jobs=args.jobs, dask=args.dask, retry=args.retry
    )


def run_compare(args) -> int:
    from ..results import report

    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    print(
        report.comparison(
            *(report.find(name, Path(args.out)) for name in (args.first, args.second)), width
        )
    )
    return 0


def run_report(args) -> int:
    from ..results import report

    print(f"page: {report.write(report.find(args.of, Path(args.out)))}")
    return 0


def run_lab(args) -> int:
    from ..host.paths import shipped

    if not NOTEBOOKS.is_dir():
        for folder in (NOTEBOOKS, EXPERIMENTS):
            if not folder.exists():
                shutil.copytree(
                    shipped(folder.name),
                    folder,
                    ignore=shutil.ignore_patterns("*.py", "*.md", ".*", "__pycache__"),
                )
                print(f"copied: {folder.resolve()}")
    os.execv(
        sys.executable,
        [
            sys.executable,
            "-m",
            "jupyterlab",
            f"--ServerApp.root_dir={NOTEBOOKS.resolve()}",
            *args.rest,
        ],
    )


# --- helpers --------------------------------------------------------------------------------------


def _workload(args, default_requests: int = DEFAULT_REQUESTS):
    """A function from the model's context to the items; a trace is read at once."""
    from ..workloads import synthetic as workload
    from ..workloads import traces

    if args.trace is None:
        if args.request_rate == "trace":
            raise BadInput("request-rate trace needs --trace")

        def make(context: int | None):
            return workload.make_workload(
                args.workload,
                args.requests or default_requests,
                seed=args.seed,
                context=context,
                request_rate=args.request_rate,
                burstiness=args.burstiness,
                scale_lengths=args.scale_lengths,
            )

        make(None)  # bad arguments are refused before the model is loaded
        return make
    items = workload.scale(
        traces.load_trace(args.trace, args.seed)[: args.requests], args.scale_lengths
    )
    if args.request_rate != "trace":
        items = workload.with_arrivals(items, args.request_rate, args.burstiness, args.seed)
    return lambda context: items


def _whole(name: str, text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdecimal()):
        raise BadInput(f"{name} must be a whole number of at least 1, not {shown(text)}")
    return at_least(name, int(text), 1)


def _strategy(name: str, others: tuple[str, ...] = ("mlx-lm",)):
    """A strategy's name, or the factory that ``module:Factory`` names."""
    if ":" not in name:
        one_of("strategy", name, (*STRATEGIES, *others))
        return name
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(import_module(module), attribute)
        make_allocator(factory, 64)
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever the user's module does, the answer is one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"cannot use strategy {shown(name)}: {reason[:200]}") from error
    finally:
        sys.path.pop(0)
    return factory


def _progress(total: int, unit: str = "tok"):
    from tqdm import tqdm

    class Bar(tqdm):
        def __enter__(self):
            super().__enter__()
            return self.advance

        def advance(self, tokens: int, strategy: str) -> None:
            self.set_description(f"{strategy:>12}", refresh=False)
            self.update(tokens)

    return Bar(total=total, unit=unit, file=sys.stderr, disable=None, leave=False, smoothing=0.05)


def _write_bench(target: Path, args, bench, document: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd

    from .. import plots
    from ..bench.serve import recommendation
    from ..results import store as results

    plots.use_style()
    tables = {
        "rows": pd.DataFrame(bench.rows),
        "requests": bench.requests(),
        "steps": bench.steps(),
    }
    run = {
        "command": "bench",
        "arguments": _arguments(args),
        "recommendation": recommendation(bench),
    }
    run |= {"environment": document["environment"], "ratios": document["ratios"]}
    with results.written_atomically(target) as folder:
        results.write_tables(folder, run, **tables)
        if fitted := bench.step_time():
            step_time, quality = fitted
            (folder / "step_time.json").write_text(step_time.to_json(model=args.model, **quality))
        for name, figure in plots.bench_figures(**tables).items():
            figure.savefig(folder / f"{name}.png")
            plt.close(figure)


def _write_replay(target: Path, args, done, where: dict, step_time) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from .. import plots
    from ..replay.simulation import tables
    from ..results import store as results

    plots.use_style()
    frames = tables(done)
    run = {
        "command": "replay",
        "arguments": _arguments(args),
        "environment": where,
        "step_time": json.loads(step_time.to_json()),
    }
    with results.written_atomically(target) as folder:
        results.write_tables(folder, run, **frames)
        for name, figure in plots.replay_figures(frames["rows"], frames["steps"]).items():
            figure.savefig(folder / f"{name}.png")
            plt.close(figure)


def _arguments(args) -> dict:
    return {
        name: str(value) if value == math.inf else value
        for name, value in vars(args).items()
        if name not in ("command", "name_of_command", "rest", "stdout")
    }


def _replay_report(args, rows: list[dict], num_requests: int, target: Path) -> str:
    from ..results.console import replay_table

    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    source = f"trace {args.trace}" if args.trace else f"workload {args.workload}"
    head = (
        f"{source}, {num_requests} requests, at most {args.max_batch_size} at once, pool: "
        f"{args.num_blocks}; times are the virtual clock's"
    )
    lines = [textwrap.fill(head, width), replay_table(rows, width)]
    for row in rows:
        if row["refused"]:
            lines.append(
                f"{row['strategy']}, blocks of {row['block_size']}: {row['refused']} requests can "
                "never fit its pool."
            )
        if row["failed"]:
            lines.append(
                f"{row['strategy']}, blocks of {row['block_size']}: {row['failed']} requests "
                "FAILED for want of memory."
            )
    return "\n".join(
        [*lines, "", f"Figures and tables: {target}/ (`cortexlab report {target}` makes a page)"]
    )


def _bench_report(args, bench, where: dict, target: Path) -> str:
    from ..bench.serve import recommendation
    from ..results.console import bench_table

    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    source = f"trace {args.trace}" if args.trace else f"workload {args.workload}"
    blocks = next((row["num_blocks"] for row in bench.rows if row["num_blocks"]), None)
    pool = f", pool of {blocks} blocks of {args.block_size}" if blocks else ""
    head = (
        f"{args.model} on {where['device']} ({where['blas']}), {source}, batch "
        f"{args.batch_size}{pool}, "
        f"{args.repeats} repeat{'s' * (args.repeats != 1)}"
    )
    lines = [
        textwrap.fill(head, width),
        bench_table(bench.rows, width),
        "",
        textwrap.fill(recommendation(bench), width),
    ]
    if refused := max(row["refused"] for row in bench.rows):
        lines.append(
            f"{refused} of {refused + len(bench.runs[0].requests)} requests were refused, and left "
            "out for all strategies."
        )
    if not bench.held:
        lines.append(
            "SOMETHING DID NOT HOLD: a request failed, or its tokens are not the model's own "
            "(column `same`)."
        )
    lines.append(f"Figures and tables: {target}/")
    lines.append(f"Next: `make lab` opens the notebooks; `cortexlab report {target}` makes a page.")
    return "\n".join(lines)


def _rate(text: str) -> float | str:
    if text == "trace":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of requests per second, inf or trace, not {text!r}"
        ) from None


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
