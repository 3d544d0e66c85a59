"""Time of decode attention over the extents of `runs` in a replay of the Azure conversation trace,
compared with contiguous sequences.

    python experiments/azure_extents.py

The trace is replayed in a pool of 60 %, and the extents of all decoding sequences are recorded at
ten instants. For each instant, attention of SmolLM2's layers is timed three ways in turn: over the
recorded extents by the engine's rule, and over contiguous sequences of equal lengths as views and
by the rule. The trace must lie in ``CORTEXLAB_TRACES``.
"""

import cortexlab  # isort: skip # noqa: F401 - first, so that its BLAS is in place before MLX
from statistics import median

import mlx.core as mx
import pandas as pd

from cortexlab.bench.measure import in_turn
from cortexlab.bench.step_profile import attend, filled_arena
from cortexlab.engine.arena import LayerShape
from cortexlab.engine.attention import RowRun
from cortexlab.replay import Replay, replay
from cortexlab.workloads.traces import load_trace

LAYERS, HEADS = [LayerShape(3, 64, 64)] * 2, 9
INSTANTS, REPEATS = 10, 7


def rows_of(run: Replay) -> list[RowRun]:
    """The decode rows of a replay's current step."""
    decoding = (each for each in run.scheduler.running if each.decoding_since is not None)
    return [
        RowRun(each.num_tokens - 1, 1, list(each.table.runs(0, each.num_tokens)))
        for each in decoding
    ]


def main() -> None:
    items = load_trace("azure_2023_conv")
    (paged,) = replay(items, ["paged"], num_blocks="60%")
    seen: list[list[RowRun]] = []  # at every hundredth sample

    def watch(run: Replay, sample: dict, ahead: int) -> None:
        if len(run.samples) % 100 == 0:
            seen.append(rows_of(run))

    run = Replay("runs", num_blocks=paged.blocks.num_blocks, on_sample=watch)
    run.run(items)
    arena = filled_arena(LAYERS, mx.float32, run.blocks.num_blocks * run.blocks.block_size, 0)
    found = []
    for rows in seen[:: max(1, len(seen) // INSTANTS)]:
        ends = pd.Series([row.stop for row in rows]).cumsum().tolist()
        whole = [
            RowRun(row.start, 1, [(end - row.stop, end)])
            for row, end in zip(rows, ends, strict=True)
        ]
        works = {
            "runs": lambda rows=rows: attend(rows, arena, HEADS, "auto"),
            "views": lambda rows=whole: attend(rows, arena, HEADS, "views"),
            "contiguous": lambda rows=whole: attend(rows, arena, HEADS, "auto"),
        }
        times = in_turn(works, REPEATS)
        ms = {name: 1000 * median(seconds) / len(LAYERS) for name, seconds in times.items()}
        extents = sum(len(row.runs) for row in rows)
        found.append({"sequences": len(rows), "tokens": ends[-1], "extents": extents} | ms)
    table = pd.DataFrame(found)
    table["runs/views"], table["runs/contiguous"] = (
        table["runs"] / table["views"],
        table["runs"] / table["contiguous"],
    )
    print(table.round(2).to_string(index=False))
    print(
        "median",
        table[["runs/views", "runs/contiguous"]].median().round(2).to_dict(),
        "(ms a layer)",
    )


if __name__ == "__main__":
    main()
