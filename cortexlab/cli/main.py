"""The command line. Exit codes: 0 done; 1 done, but something did not hold; 2 bad input (one line
on standard error, nothing written).
"""

import contextlib
import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from ..errors import BadInput, CortexLabError, ModelError, a_path, shown
from . import allocbench, bench, replay, traces
from .options import Help, Parser, named_as_options, terminal_width

NOTEBOOKS, EXPERIMENTS = Path("notebooks"), Path("experiments")
MODULES = {  # commands with a module of their own
    "bench": (bench, "run a workload on a real model under each strategy and under mlx-lm"),
    "replay": (
        replay,
        "a workload or an hour of a trace through scheduler and allocators alone, on a virtual "
        "clock",
    ),
    "allocbench": (
        allocbench,
        "what bookkeeping costs: microseconds an operation, by strategy and size of pool",
    ),
    "traces": (traces, "what a trace file holds, as it is understood; which traces are known"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command is not run_lab:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = [option for option in rest if option != "--"]
    try:
        with contextlib.ExitStack() as args.until_end:
            if getattr(args, "json", False):  # nothing but the document goes to standard output
                args.until_end.enter_context(contextlib.redirect_stdout(sys.stderr))
            code, text = args.command(args)
        if text:
            print(text)
        return code
    except CortexLabError as error:
        message = named_as_options(str(error), args)
        print(f"{parser.prog} {args.name_of_command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "what is finished is kept, the same command goes on"
        kept = goes_on if args.command is run_sweep else "nothing was written"
        print(f"interrupted: {kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cortexlab ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser() -> Parser:
    parser = Parser(
        prog="cortexlab",
        description="How should an LLM's KV cache be laid out and allocated, and what does it "
        "cost?",
    )
    version = f"cortexlab {metadata.version('cortexlab')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        sub.set_defaults(command=run, name_of_command=name)
        return sub

    text = "what this machine is, how fast, and what to do where it falls short"
    doctor = command("doctor", run_doctor, text)
    doctor.add_argument("--json", action="store_true", help="one JSON document")
    for name, (module, text) in MODULES.items():
        module.add_arguments(command(name, module.run, text))
    _add_sweep(command)
    _add_results(command)
    text = "fetch the embedded model into the user's cache, unless it is there"
    command("fetch-model", run_fetch, text)
    text = (
        "open JupyterLab on the notebooks (copied here where there are none); other options go to "
        "jupyter lab (--no-browser, --port 8889)"
    )
    command("lab", run_lab, text)
    return parser


def _add_sweep(command) -> None:
    text = (
        "run a notebook or a replay over a grid of parameters and collect the rows; goes on where "
        "it was killed"
    )
    add = command("sweep", run_sweep, text).add_argument
    add(
        "file",
        help="a YAML file (notebook or function, grid, optionally plot), or the name of one that "
        "came with cortexlab, such as quickstart",
    )
    add("--name", help="folder under --out (default: the file's name)")
    add("--out", default="results", help="where results go")
    add(
        "--jobs",
        type=int,
        default=1,
        help="processes, which share the BLAS's threads; times that are measured beside each other "
        "are longer",
    )
    add(
        "--dask",
        metavar="ADDRESS",
        help="a Dask scheduler whose workers run the points instead, such as tcp://host:8786",
    )
    add("--retry", action="store_true", help="run the points again that failed before")
    add(
        "--point-timeout",
        type=float,
        metavar="SECONDS",
        help="a point that takes longer fails, and no other (default: the file's timeout, if any)",
    )


def _add_results(command) -> None:
    text = "what differs between two results: settings, machine, figures with their intervals"
    compare = command("compare", run_compare, text)
    folder = "a folder of results, or its name under --out"
    compare.add_argument("first", metavar="RUN", help=folder)
    compare.add_argument("second", metavar="RUN", help="the other")
    text = "one self-contained HTML page of a result: figures, tables, machine, how to reproduce it"
    report = command("report", run_report, text)
    report.add_argument("of", metavar="NAME", help=folder)
    for each in (compare, report):
        each.add_argument("--out", default="results", help="where results are")


# --- commands: each returns its exit code and what it prints --------------------------------------


def run_doctor(args) -> tuple[int, str]:
    from ..bench import doctor

    found = doctor.examine()
    text = json.dumps(found) if args.json else doctor.report(found)
    return 0 if doctor.can_run(found) else 1, text


def run_fetch(args) -> tuple[int, str]:
    from ..host import models

    path = models.find_smollm2()
    with contextlib.suppress(ModelError):  # a damaged file is fetched again
        if path is not None:
            models.check_sha256(path)
            return 0, f"model: {path}"
    print("fetching the model (93 MB) ...", flush=True)
    return 0, f"model: {models.fetch_smollm2()}"


def run_sweep(args) -> tuple[int, str]:
    from ..host.paths import shipped
    from ..results import sweep

    file = Path(a_path("file", args.file))
    if not os.path.exists(file) and file.name == args.file:
        file = shipped(EXPERIMENTS.name) / f"{file.stem}.yaml"
        if not os.path.isfile(file):
            known = ", ".join(sorted(each.stem for each in file.parent.glob("*.yaml")))
            raise BadInput(
                f"there is no file {shown(args.file)} here, and no grid of that name came with "
                f"cortexlab: use a path, or {known}"
            )
    how = {"jobs": args.jobs, "dask": args.dask, "retry": args.retry}
    how["timeout"] = args.point_timeout
    return sweep.run(file, Path(args.out), args.name, **how), ""


def run_compare(args) -> tuple[int, str]:
    from ..results import report

    folders = (report.find(name, Path(args.out)) for name in (args.first, args.second))
    return 0, report.comparison(*folders, terminal_width())


def run_report(args) -> tuple[int, str]:
    from ..results import report

    return 0, f"page: {report.write(report.find(args.of, Path(args.out)))}"


def run_lab(args) -> tuple[int, str]:
    from ..host.paths import shipped

    if not NOTEBOOKS.is_dir():
        ignored = shutil.ignore_patterns("*.py", "*.md", ".*", "__pycache__")
        for folder in (NOTEBOOKS, EXPERIMENTS):
            if not folder.exists():
                shutil.copytree(shipped(folder.name), folder, ignore=ignored)
                print(f"copied: {folder.resolve()}")
    root = f"--ServerApp.root_dir={NOTEBOOKS.resolve()}"
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", root, *args.rest])
    return 0, ""  # where this process was not replaced


def entry() -> None:
    """The console script. A letter that standard output cannot show is written as its number."""
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
