"""The explorer without a browser: every control changes the picture, block maps are the block
tables, and errors show in the page.
"""

import io

import numpy as np
import pytest
from PIL import Image

from cortexlab import plots
from cortexlab.allocators import Paged
from cortexlab.plots import widgets
from cortexlab.workloads.synthetic import make_workload


@pytest.fixture(scope="module")
def runs():
    return widgets.record(
        make_workload("lognormal", 60, seed=1, request_rate=10.0),
        ("cortexstream", "paged"),
        16,
        "60%",
    )


def test_a_block_map_is_what_the_live_sequences_hold(runs):
    for run in runs:
        assert len(run.moments) == len(run.samples) > 20
        for moment in run.moments:
            held = np.bincount(moment.owners[moment.owners >= 0], minlength=60)
            assert {number: blocks for number, _, _, blocks, _ in moment.live} == {
                number: n for number, n in enumerate(held) if n
            }
            assert all(
                0 <= tokens - 1 <= 16 * blocks and tokens <= of
                for _, tokens, of, blocks, _ in moment.live
            )


def test_recording_a_replay_changes_no_result(runs):
    (plain,) = widgets.replay(
        make_workload("lognormal", 60, seed=1, request_rate=10.0),
        ["paged"],
        num_blocks=runs[1].blocks.num_blocks,
    )
    assert {**plain.row, "seconds": 0} == {**runs[1].row, "seconds": 0}


def test_a_frame_shows_the_moment(runs):
    stage = widgets.Stage(runs)
    images = [
        np.asarray(Image.open(io.BytesIO(stage.png(at))))
        for at in (0.0, stage.end / 2, stage.end / 2)
    ]
    assert (images[0] != images[1]).any() and (images[1] == images[2]).all()
    names = [name for name, _ in stage.moments(1.0)]
    assert names == ["cortexstream", "paged"] and all(
        moment.at <= 1.0 for _, moment in stage.moments(1.0)
    )
    assert all(name in stage.listed(stage.end / 2) for name in names)


def test_every_control_changes_the_picture_and_an_error_shows(monkeypatch):
    plots.use_style()
    page = widgets.explorer(num_requests=60)
    controls, player, picture, tables, message = page.children
    slider = player.children[1]
    seen = {picture.value}
    slider.value = 150
    seen.add(picture.value)
    for control in controls.children:
        values = [each[1] if isinstance(each, tuple) else each for each in control.options]
        control.value = next(
            each
            for each in reversed(values)
            if each not in [other.value for other in controls.children]
        )
        seen.add(picture.value)
        assert not message.value, message.value
    assert len(seen) == 2 + len(controls.children) and "tokens" in tables.value
    controls.children[1].value = controls.children[2].value
    assert "choose two strategies" in message.value
    controls.children[1].value = "buddy"
    assert not message.value
    monkeypatch.setattr(widgets.Stage, "png", lambda *_: 1 / 0)
    slider.value = 10
    assert "ZeroDivisionError" in message.value


def test_the_explorer_takes_strategies_of_ones_own_by_name_and_as_factories(tmp_path, monkeypatch):
    source = "from cortexlab.allocators import Paged\n\nclass Tidy(Paged):\n    pass\n"
    (tmp_path / "mine_explored.py").write_text(source)
    monkeypatch.chdir(tmp_path)

    class Mine(Paged):
        pass

    page = widgets.explorer(num_requests=20, strategies=("mine_explored:Tidy", Mine))
    controls, _, _, listing, message = page.children
    assert message.value == "" and "Tidy" in listing.value and "Mine" in listing.value
    left, right = controls.children[1:3]
    right.value = "runs"
    assert message.value == "" and "Mine" not in listing.value
    assert left.value == "mine_explored:Tidy"


def test_the_explorer_offers_the_traces_on_this_machine_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("CORTEXLAB_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setenv("CORTEXLAB_TRACES", str(tmp_path))
    workload = widgets.explorer(num_requests=20).children[0].children[0]
    assert list(workload.options) == list(widgets.EXPLORED)
    lines = [
        f"2023-11-16 18:17:{second:02}.0000000,{100 + second},{20 + second}" for second in range(30)
    ]
    (tmp_path / "azure_2023_conv.csv").write_text(
        "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines])
    )
    page = widgets.explorer(num_requests=20)
    workload, picture = page.children[0].children[0], page.children[2]
    before = picture.value
    workload.value = "azure_2023_conv"
    assert picture.value != before and not page.children[-1].value
