"""The command ``traces``."""

import argparse
import json
import textwrap
from pathlib import Path

from .options import add_trace_options, check_counts, terminal_width

WIDTH = 80  # columns of what is printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", nargs="?", help="a trace as --trace takes it; without one: what --trace takes")
    add("--requests", type=int, help="read only so many, the first of the file")
    add_trace_options(parser)
    add("--json", action="store_true", help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> tuple[int, str]:
    from ..workloads import trace_formats, traces
    from ..workloads.trace_summary import summary

    check_counts(args, requests=1, trace_block=1)
    if args.file is None:
        here = traces.known_here()
        known = [
            {"name": name, "here": name in here, "file": file, "source": source}
            for name, (file, source) in traces.KNOWN.items()
        ]
        document = {"known": known, "formats": trace_formats.FORMATS}
        return 0, json.dumps(document) if args.json else _listed(document)
    trace = traces.read_trace(args.file, 0, args.requests, args.trace_block)
    found = summary(trace)
    return 0, json.dumps(found, allow_nan=False) if args.json else _report(found)


def _listed(document: dict) -> str:
    lines = ["Known traces:"]
    for known in document["known"]:
        is_here = "here" if known["here"] else f"not here: save as {known['file']}"
        lines += [f"  {known['name']} ({is_here})", *_wrapped(known["source"])]
    lines += ["", "Formats, told by their columns (.gz, .zst and - for standard input too):"]
    for name, columns in document["formats"].items():
        lines += [f"  {name}", *_wrapped(columns)]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    width = min(WIDTH, terminal_width())
    return textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")


def _report(found: dict) -> str:
    rows = {"format": found["format"], "requests": f"{found['requests']:,}"}
    rows["left out"] = f"{found['left_out']:,}"
    rows["span"] = f"{found['span_s']:,.3f} s"
    if found["request_rate"] is not None:
        rows["rate"] = (
            f"{found['request_rate']:.3g} requests/s, CV of gaps {found['arrival_cv']:.2f}"
        )
    for kind in ("prompt", "output"):
        values = found[f"{kind}_tokens"].items()
        rows[f"{kind} tokens"] = "  ".join(f"{name} {value:,}" for name, value in values)
    if found["repeated_prefix_share"] is not None:
        share, block = found["repeated_prefix_share"], found["prefix_block"]
        rows["repeated prefixes"] = f"{share:.1%} of prompt blocks ({block} tokens each)"
    name = found["name"] if len(found["name"]) <= WIDTH else Path(found["name"]).name
    lines = [name, *(f"{label:<18}{value}" for label, value in rows.items())]
    for remark in found["remarks"]:
        lines += textwrap.wrap(f"- {remark}", WIDTH)
    return "\n".join(lines)
