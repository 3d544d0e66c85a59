"""Options that several commands share: how they are declared, read and named in messages."""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from ..allocators import STRATEGIES
from ..allocators.own import own_strategy
from ..errors import BadInput, at_least, one_of, shown
from ..options import Options, as_option

DEFAULT_REQUESTS = 16
STRATEGIES_HELP = f"comma-separated: {', '.join(STRATEGIES)}, mlx-lm, or module:Factory of your own"
LONGEST_USAGE = 1000  # characters of a message about bad usage
ALIASES = {"num_requests": "requests"}  # parameter of the library -> option


class Parser(argparse.ArgumentParser):
    """Bad usage is bad input: one line, exit code 2."""

    def error(self, message: str):
        line = " ".join(message.splitlines())
        line = line if len(line) <= LONGEST_USAGE else line[:LONGEST_USAGE] + "…"
        self.exit(2, f"{self.prog}: {line}\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def add_options(
    parser: argparse.ArgumentParser, kind: type[Options], *names: str, **words: str
) -> None:
    """One option for each of the named fields of ``kind``, with its default, choices and words;
    ``words`` says it otherwise for some.
    """
    declared = {each.name: each for each in fields(kind)}
    for name in names:
        each, more = declared[name], {}
        types_of = [one for one in get_args(each.type) or (each.type,) if one is not type(None)]
        if types_of == [bool]:
            more["action"] = "store_true"
        elif choices := each.metadata["choices"]:
            more = {"choices": choices, "default": each.default}
        else:
            more = {"type": types_of[0], "default": each.default}
        parser.add_argument(as_option(name), help=words.get(name, each.metadata["words"]), **more)


def chosen(args: argparse.Namespace, kind: type[Options], **more) -> dict:
    """The fields of ``kind`` on the command line, checked together with ``more``."""
    given = {each.name: getattr(args, each.name) for each in fields(kind) if each.name in args}
    given = {
        name: value for name, value in given.items() if name not in ("num_blocks", "block_size")
    }
    kind(num_blocks=1, **given | more)
    return given


def add_workload(
    parser: argparse.ArgumentParser, requests: int, rate: str, trace_rate: str | None = None
) -> None:
    """Options of what arrives. ``rate``: default of a workload; ``trace_rate``: of a trace."""
    add = parser.add_argument
    add("--requests", type=int, help=f"how many (default: {requests}, or all of a trace)")
    add("--workload", default="chat", help="chat, lognormal, heavy-tail or shared-prefix")
    add(
        "--trace",
        help="azure_2023_conv, mooncake_conversation, a file (`cortexlab traces` lists the "
        "formats), or - for standard input, instead of a --workload",
    )
    add_trace_options(parser)
    text = "requests per second, inf (all at time 0) or trace (the trace's own times)"
    if trace_rate is None:
        add("--request-rate", type=_rate, default=rate, help=text)
    else:
        text += f" (default: {rate}, or {trace_rate} with a trace)"
        add("--request-rate", type=_rate, help=text)
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
    add("--seed", type=int, default=0, help="seed of lengths, arrivals and tokens")


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """Options of how a trace is read."""
    parser.add_argument(
        "--trace-block",
        type=int,
        metavar="N",
        help="prompt tokens for each hash id of the trace, where its format does not say",
    )


def add_result(parser: argparse.ArgumentParser, command: str) -> None:
    """Options of where a result goes."""
    add = parser.add_argument
    add("--name", help=f"folder under --out (default: {command}-<UTC time>)")
    add("--out", default="results", help="where results go")
    add("--overwrite", action="store_true", help="replace a result of that name")
    add("--json", action="store_true", help="print one JSON document and nothing else")


def target_of(args: argparse.Namespace) -> Path:
    """The folder that a result goes to, held against other processes until the command ends."""
    from ..results import store

    claim = store.claimed(Path(args.out), args.name, args.overwrite, args.name_of_command)
    return args.until_end.enter_context(claim)


def source_of(args: argparse.Namespace) -> str:
    """Words for what arrives."""
    return f"trace {args.trace}" if args.trace else f"workload {args.workload}"


@dataclass(frozen=True)
class Arriving:
    """What arrives: a function from the model's context to the items."""

    make: Callable[[int | None], list]
    trace: dict | None = None  # what ``run.json`` says of the trace

    def __call__(self, context: int | None) -> list:
        return self.make(context)


def workload_of(args: argparse.Namespace, requests: int) -> Arriving:
    """The workload that the options name; a trace is read at once, and bad arguments are refused
    before a model is loaded. What was not taken as a trace has it is said on standard error.
    """
    from ..workloads import synthetic, traces

    if args.trace is None:
        if args.request_rate == "trace":
            raise BadInput("request_rate trace needs --trace")
        if args.trace_block is not None:
            raise BadInput("trace_block needs --trace")

        args.requests = args.requests or requests  # as ``run.json`` tells it

        def make(context: int | None) -> list:
            return synthetic.make_workload(
                args.workload, args.requests, seed=args.seed, context=context,
                request_rate=args.request_rate, burstiness=args.burstiness,
                scale_lengths=args.scale_lengths,
            )  # fmt: skip

        make(None)
        return Arriving(make)
    trace = traces.read_trace(args.trace, args.seed, args.requests, args.trace_block)
    if trace.remarks:
        print(f"trace {trace.name}: {'; '.join(trace.remarks)}", file=sys.stderr)
    items = synthetic.scale(trace.items, args.scale_lengths)
    if args.request_rate != "trace":
        items = synthetic.with_arrivals(items, args.request_rate, args.burstiness, args.seed)
    return Arriving(lambda context: items, trace.described())


def strategies_of(text: str, others: tuple[str, ...] = ()) -> list:
    """The strategies that a comma-separated list names; ``others`` are names beside them."""
    return [strategy_named(name.strip(), others) for name in text.split(",")]


def strategy_named(name: str, others: tuple[str, ...] = ()) -> str | Callable:
    """A strategy's name, or the factory that ``module:Factory`` names."""
    if ":" not in name:
        return one_of("strategy", name, (*STRATEGIES, *others))
    return own_strategy(name)


def numbers_of(name: str, text: str, number: type = int) -> list:
    """The numbers that a comma-separated list names, each once."""
    found = []
    for part in text.split(","):
        try:
            found.append(number(part))
        except ValueError:
            kind = "whole numbers" if number is int else "numbers"
            raise BadInput(
                f"{name} must be {kind} with commas between, not {shown(text)}"
            ) from None
    return list(dict.fromkeys(found))


def check_counts(args: argparse.Namespace, **minimum: int) -> None:
    """`BadInput` for a given option below its minimum."""
    for name, least in minimum.items():
        if (value := getattr(args, name)) is not None:
            at_least(name, value, least)


def named_as_options(message: str, args: argparse.Namespace) -> str:
    """A library's message with the options of a command for the parameters it names: a name with
    an underscore, and any name before ``must be`` or ``=True``.
    """
    names = {name: name for name in vars(args)}
    names |= {name: option for name, option in ALIASES.items() if option in names}

    def option(found: re.Match) -> str:
        name, rest = found[1], message[found.end() :]
        told = "_" in name or found[2] or rest.startswith(" must be ")
        return as_option(names[name]) if told and name in names else found[0]

    return re.sub(r"(?<![\w/.'\"-])(\w+)(=True)?(?![\w/.'\"-])", option, message)


def given_arguments(args: argparse.Namespace) -> dict:
    """What a result's ``run.json`` says of the command line."""
    from ..results.store import in_json

    hidden = ("command", "name_of_command", "rest", "until_end")
    return in_json({name: value for name, value in vars(args).items() if name not in hidden})


def terminal_width() -> int:
    """Columns of the terminal, 120 at most."""
    return min(120, shutil.get_terminal_size((120, 24)).columns)


def filled(text: str) -> str:
    """``text`` in lines that fit the terminal."""
    return textwrap.fill(text, terminal_width())


def progress_bar(total: int, unit: str = "tok"):
    """A context that gives a function ``(count, strategy)`` and shows a bar on standard error."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __enter__(self):
            super().__enter__()
            return self.advance

        def advance(self, count: int, strategy: str) -> None:
            self.set_description(f"{strategy:>12}", refresh=False)
            self.update(count)

    return Bar(total=total, unit=unit, file=sys.stderr, disable=None, leave=False, smoothing=0.05)


def save_figures(folder: Path, figures: dict) -> None:
    """``<name>.png`` for each figure."""
    import matplotlib.pyplot as plt

    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
        plt.close(figure)


def _rate(text: str) -> float | str:
    if text == "trace":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of requests per second, inf or trace, not {text!r}"
        ) from None
