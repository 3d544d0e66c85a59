"""Interactive views for notebooks. Pictures go into one `ipywidgets.Image`, drawn once and updated; errors show in the page."""

import io

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd

from . import plots


def block_map_slider(steps: pd.DataFrame) -> ipywidgets.VBox:
    """The block maps of all strategies on one clock, with a slider over time.

    ``steps`` is the steps table of a bench run; its first repeat is shown. The slider is a play position in seconds.
    """
    steps = steps[(steps["repeat"] == 0) & steps["extents"].notna()]
    parts = {name: part for name, part in steps.groupby("strategy", sort=False)}
    with plt.ioff():
        axes = plots.block_map(steps, at=0.0)
    figure = axes[0].figure
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
    slider = ipywidgets.FloatSlider(
        value=0, min=0, max=float(steps["ended_at"].max()), step=float(steps["ended_at"].max()) / 200,
        description="time (s)", readout_format=".2f", layout=ipywidgets.Layout(width="70%"),
    )  # fmt: skip
    message = ipywidgets.HTML()

    def draw(at: float) -> None:
        try:
            for panel, (name, part) in zip(axes, parts.items(), strict=True):
                plots.draw_map(panel, plots.step_at(part, at), name, at)
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=80)
            picture.value, message.value = png.getvalue(), ""
        except Exception as error:  # a widget callback that raises shows nowhere by itself
            message.value = f"<b>could not draw: {type(error).__name__}: {error}</b>"

    slider.observe(lambda change: draw(change["new"]), names="value")
    draw(slider.value)
    plt.close(figure)
    return ipywidgets.VBox([slider, picture, message])
