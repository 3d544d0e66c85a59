"""Interactive views for notebooks. A view draws into one `ipywidgets.Image` and updates it; errors
show in the page.
"""

import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .. import plots
from ..allocators import STRATEGIES, Allocator, strategy_of
from ..allocators.own import own_strategy
from ..errors import BadInput
from ..replay import Replay, replay, tables
from ..workloads import traces
from ..workloads.synthetic import WorkItem, default_max_seq_len, make_workload
from .block_map import mapped
from .style import share_legend, stack_over_time


def block_map_slider(steps: pd.DataFrame) -> ipywidgets.VBox:
    """The block maps of all strategies on one clock, with a slider over time.

    ``steps``: the steps table of a bench run, whose first repeat is shown. The slider's unit is
    seconds.
    """
    steps = mapped(steps)
    parts = {name: part for name, part in steps.groupby("strategy", sort=False)}
    with plt.ioff():
        axes = plots.block_map(steps, at=0.0)
    figure = axes[0].figure
    picture, message = _picture(), ipywidgets.HTML()
    end = float(steps["ended_at"].max())
    slider = ipywidgets.FloatSlider(
        value=0,
        min=0,
        max=end,
        step=end / 200,
        description="time (s)",
        readout_format=".2f",
        layout=ipywidgets.Layout(width="70%"),
    )

    def draw(at: float) -> None:
        try:
            for panel, (name, part) in zip(axes, parts.items(), strict=True):
                plots.draw_map(panel, plots.step_at(part, at), name, at)
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=80)
            picture.value, message.value = png.getvalue(), ""
        except Exception as error:  # an error in a widget's callback shows nowhere by itself
            message.value = f"<b>could not draw: {type(error).__name__}: {error}</b>"

    slider.observe(lambda change: draw(change["new"]), names="value")
    draw(slider.value)
    plt.close(figure)
    return ipywidgets.VBox([slider, picture, message])


def _picture() -> ipywidgets.Image:
    return ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))


# --- the explorer ---------------------------------------------------------------------------------

NUM_FRAMES = 400  # of the slider, over the longer of the two replays
LISTED = 8  # live sequences in a table: those that hold most blocks
EXPLORED = ("lognormal", "chat", "heavy-tail")
# Style of a table's cells: JupyterLab and Voila differ in how they align cells without one.
CELL = '<{} style="text-align:right;padding:0 .6em">'
COLUMNS = ("sequence", "tokens", "of", "blocks", "extents")


@dataclass(frozen=True, slots=True)
class Moment:
    """A sample of a replay. ``owners``: for every block the number of the request that holds it, -1
    where free. ``live``: a row a live sequence, its values as in `COLUMNS`.
    """

    at: float  # seconds
    owners: np.ndarray
    live: list[tuple[int, int, int, int, int]]
    num_waiting: int


Named = str | Callable[[int], Allocator]  # a strategy's name, `module:Factory`, or a factory


class Recorded(Replay):
    """A replay that takes down the block tables at each of its samples."""

    def __init__(self, strategy: Named, **options):
        super().__init__(strategy, on_sample=Recorded._take_down, **options)
        self._moments: dict[float, Moment] = {}

    @property
    def moments(self) -> list[Moment]:
        return [self._moments[sample["started_at"]] for sample in self.samples]

    def _take_down(self, sample: dict, ahead: int) -> None:
        owners = np.full(self.blocks.num_blocks, -1, dtype=np.int32)
        live, held = [], []
        for request in self.scheduler.running:
            number, extents = int(request.id[1:]), request.table.all_extents
            held += [[number, extent.start, extent.num_blocks] for extent in extents]
            for extent in extents:
                owners[extent.start : extent.end] = number
            tokens = request.num_tokens + (ahead if request.decoding_since is not None else 0)
            last = len(request.prompt) + request.output_length
            live.append((number, tokens, last, request.table.num_blocks, len(extents)))
        sample["extents"] = held  # in the form of a bench run's steps
        at = sample["started_at"]
        self._moments[at] = Moment(at, owners, live, sample["num_waiting"])


def record(
    items: Sequence[WorkItem], strategies: Sequence[Named], block_size: int, num_blocks: str
) -> list[Recorded]:
    """Each strategy on ``items``, in a pool of the same size: ``num_blocks`` as
    `cortexlab.replay.replay` takes it.
    """
    (paged,) = replay(items, ["paged"], block_sizes=[block_size], num_blocks=num_blocks)
    runs = [
        Recorded(
            own_strategy(name) if isinstance(name, str) and ":" in name else name,
            num_blocks=paged.blocks.num_blocks,
            block_size=block_size,
            max_seq_len=default_max_seq_len(items),
        )
        for name in strategies
    ]
    for run in runs:
        run.run(items)
    return runs


class Stage:
    """Two replays side by side on one clock: block map above, shares of memory with a cursor below.

    Axes, shares and labels are drawn once; a frame restores their pixels and draws maps, titles and
    cursors upon them.
    """

    def __init__(self, runs: Sequence[Recorded]):
        self._runs = [(run.strategy.name, run.moments) for run in runs]
        self.end = max(moments[-1].at for _, moments in self._runs)
        samples = tables(runs)["steps"]
        figure = Figure(figsize=(plots.WIDTH, 5.2), dpi=100, layout="constrained")
        axes = figure.subplots(2, len(runs), sharex="row", sharey="row")
        self._canvas, self._moving = FigureCanvasAgg(figure), []
        for panel, graph, (name, moments) in zip(*axes, self._runs, strict=True):
            image = panel.imshow(
                plots.map_image(moments[0].owners),
                aspect="auto",
                interpolation="nearest",
                animated=True,
            )
            panel.set(xticks=[], yticks=[])
            title = panel.set_title(" ", loc="left", color=plots.color(name), animated=True)
            stack_over_time(graph, samples[samples["strategy"] == name])
            graph.set(xlabel="time (s)", xlim=(0, self.end))
            cursor = graph.axvline(0, color="black", linewidth=1.2, animated=True)
            self._moving.append((image, title, cursor))
        axes[1][0].set_ylabel("KV slots (tokens)")
        figure.legend(*share_legend(), loc="outside lower center", ncols=4, fontsize=9)
        self._canvas.draw()
        self._still = self._canvas.copy_from_bbox(figure.bbox)

    def moments(self, at: float) -> list[tuple[str, Moment]]:
        """Each strategy's last moment begun by ``at`` seconds."""
        return [
            (name, moments[max(0, np.searchsorted([each.at for each in moments], at, "right") - 1)])
            for name, moments in self._runs
        ]

    def png(self, at: float) -> bytes:
        """The frame of ``at`` seconds."""
        self._canvas.restore_region(self._still)
        for (name, moment), (image, title, cursor) in zip(
            self.moments(at), self._moving, strict=True
        ):
            image.set_data(plots.map_image(moment.owners))
            held = (moment.owners >= 0).mean()
            title.set_text(
                f"{name} at {at:.1f} s: {len(moment.live)} run, {moment.num_waiting} wait, "
                f"{held:.0%} of blocks held"
            )
            cursor.set_xdata([at, at])
            for artist in (image, title, cursor):
                artist.axes.draw_artist(artist)
        file = io.BytesIO()
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB").save(
            file, "png", compress_level=1
        )
        return file.getvalue()

    def listed(self, at: float) -> str:
        """The live sequences that hold most blocks, as HTML, a table a strategy."""
        parts = []
        for name, moment in self.moments(at):
            most = sorted(moment.live, key=lambda each: -each[3])[:LISTED]
            table = pd.DataFrame(most, columns=COLUMNS).to_html(index=False, border=0)
            table = table.replace("<td>", CELL.format("td")).replace("<th>", CELL.format("th"))
            num_more = len(moment.live) - len(most)
            more = f"<br>and {num_more} more" if num_more else ""
            parts.append(
                f'<div style="margin-right:4em"><b style="color:{plots.color(name)}">'
                f"{html.escape(name)}</b>{table}{more}</div>"
            )
        return f'<div style="display:flex;line-height:1.3">{"".join(parts)}</div>'


def explored(name: str, num_requests: int, request_rate: float, seed: int) -> list[WorkItem]:
    """A workload made at ``request_rate``, or the beginning of a trace with its own arrivals."""
    if name in traces.KNOWN:
        return traces.load_trace(name, seed, num_requests)
    return make_workload(name, num_requests, seed=seed, request_rate=request_rate)


def explorer(
    workload: str = "lognormal",
    num_requests: int = 300,
    request_rate: float = 10.0,
    strategies: tuple[Named, Named] = ("cortexstream", "runs"),
    block_size: int = 16,
    num_blocks: str = "60%",
    seed: int = 1,
) -> ipywidgets.VBox:
    """Choose a workload, two strategies, a block size, a pool; play both replays on one clock.

    A strategy of your own is a factory, or ``module:Factory``: a module of the notebook's folder. A
    trace (those on this machine are offered) is its first ``num_requests``, with its own
    arrivals. Errors show in the page. Children: controls, player, picture, tables, message.
    """
    chosen = _controls(workload, strategies, block_size, num_blocks)
    player, slider = _player()
    picture, listing, message = _picture(), ipywidgets.HTML(), ipywidgets.HTML()
    stage: list[Stage] = []  # at most one: the stage on show

    def show(work) -> None:
        try:
            work()
            at = stage[0].end * slider.value / NUM_FRAMES
            picture.value, listing.value, message.value = stage[0].png(at), stage[0].listed(at), ""
        except Exception as error:  # an error in a widget's callback shows nowhere by itself
            message.value = f"<b>{type(error).__name__}: {html.escape(str(error))}</b>"

    def replayed() -> None:
        names = chosen["left"].value, chosen["right"].value
        if len(set(names)) < 2:
            raise BadInput(f"left and right are both {names[0]}: choose two strategies")
        items = explored(chosen["workload"].value, num_requests, request_rate, seed)
        stage[:] = [Stage(record(items, names, chosen["block_size"].value, chosen["pool"].value))]

    for control in chosen.values():
        control.observe(lambda _: show(replayed), names="value")
    slider.observe(lambda _: show(lambda: None), names="value")
    show(replayed)
    controls = ipywidgets.HBox(list(chosen.values()))
    controls.layout.flex_flow = "row wrap"
    return ipywidgets.VBox([controls, player, picture, listing, message])


def _controls(
    workload: str, strategies: tuple[Named, Named], block_size: int, num_blocks: str
) -> dict[str, ipywidgets.Dropdown]:
    """The explorer's dropdowns by name; what was given is the value of each."""

    def dropdown(description: str, options: Iterable, value) -> ipywidgets.Dropdown:
        return ipywidgets.Dropdown(
            options=list(options),
            value=value,
            description=description,
            layout=ipywidgets.Layout(width="15em"),
            style={"description_width": "5em"},
        )

    offered = {each: strategy_of(each).name if callable(each) else each for each in strategies}
    named = [(name, each) for each, name in ({name: name for name in STRATEGIES} | offered).items()]
    sizes = sorted({1, 4, 8, 16, 32, 64, 128, block_size})
    pools = dict.fromkeys([num_blocks, "30%", "45%", "60%", "80%", "100%"])
    return {
        "workload": dropdown("workload", [*EXPLORED, *traces.known_here()], workload),
        "left": dropdown("left", named, strategies[0]),
        "right": dropdown("right", named, strategies[1]),
        "block_size": dropdown("block size", sizes, block_size),
        "pool": dropdown("pool", pools, num_blocks),
    }


def _player() -> tuple[ipywidgets.HBox, ipywidgets.IntSlider]:
    """Play button and slider over `NUM_FRAMES`, tied to each other; the slider by itself, too."""
    play = ipywidgets.Play(min=0, max=NUM_FRAMES, interval=150)
    slider = ipywidgets.IntSlider(
        min=0,
        max=NUM_FRAMES,
        description="moment",
        readout=False,
        layout=ipywidgets.Layout(width="60%"),
    )
    ipywidgets.jslink((play, "value"), (slider, "value"))
    return ipywidgets.HBox([play, slider]), slider
