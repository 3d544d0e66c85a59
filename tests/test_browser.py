"""Notebooks in JupyterLab and Voila, shown by headless Chromium. The latency of their sliders is
printed.

The tests are skipped on a machine without Chromium, but fail there if CI is set. Set
``SCREENSHOTS`` to a folder to keep screenshots.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "Chromium", "Google Chrome")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PRESSES, SLOWEST_MS = 20, 600  # key presses on a slider, and the limit of their median latency
MINUTE_MS = 60_000
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium on this machine"
)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "CI has no Chromium: install the package `chromium`"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, request):
    page = chromium.new_page(viewport={"width": 1400, "height": 1100})
    page.route(  # requests to other machines, such as icon fonts, are blocked
        lambda url: "127.0.0.1" not in url and not url.startswith(("data:", "blob:")),
        lambda route: route.abort(),
    )
    page.set_default_timeout(MINUTE_MS)
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{request.node.name}.png")
    page.close()


@pytest.fixture
def serve(tmp_path):
    """Function that starts a server on copies of the notebooks, with its own settings folders. The
    server and its kernels end with the test.
    """
    started = []

    def start(command: list[str], token_option: str, ready: str) -> tuple[str, Path]:
        notebooks = tmp_path / "notebooks"
        shutil.copytree(ROOT / "notebooks", notebooks)
        settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text(
            '{"fetchNews": "false", "checkForUpdates": false}'
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "IPYTHONDIR",
            "MPLCONFIGDIR",
        )
        environment = os.environ | {name: str(tmp_path / name.lower()) for name in own}
        log = tmp_path / "server.log"
        command = [
            sys.executable,
            "-m",
            *command,
            "--no-browser",
            f"--port={port}",
            f"{token_option}=secret",
        ]
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=notebooks,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        started.append(process)
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}{ready}?token=secret").close()
                return address, notebooks
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"no server within a minute:\n{log.read_text()[-3000:]}")

    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(30)  # a Jupyter server ends after its kernels
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def lab(serve, tmp_path):
    """Function that starts JupyterLab."""
    folders = [f"--ServerApp.root_dir={tmp_path / 'notebooks'}"]
    folders += [
        f"--LabApp.{name}_dir={tmp_path / name.rpartition('_')[2]}"
        for name in ("user_settings", "workspaces")
    ]
    command = ["jupyterlab", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0"]
    return lambda: serve([*command, *folders], "--IdentityProvider.token", "/api/status")


def run_all(page, address: str, notebooks: Path, name: str) -> list:
    """Open a notebook, run all its cells and save it; returns the saved code cells."""
    path = notebooks / f"{name}.ipynb"
    page.goto(f"{address}/lab/workspaces/{name}/tree/{path.name}?token=secret")
    bar = page.locator("#jp-main-statusbar")
    # JupyterLab silently drops a Run All that comes before the kernel is there.
    bar.get_by_text(re.compile(r"\| Idle")).wait_for()
    shipped = [
        cell.execution_count for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"
    ]
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_role("menuitem", name="Clear Outputs of All Cells").click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('[data-command="runmenu:run-all"]').click()
    for _ in range(1800):
        page.keyboard.press("Control+s")
        page.wait_for_timeout(300)
        if not path.read_text(encoding="utf-8"):  # JupyterLab is writing it
            continue
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        if [cell.execution_count for cell in cells] == shipped and "| Idle" in bar.inner_text():
            return cells
        if any(output.output_type == "error" for cell in cells for output in cell.outputs):
            return cells
    raise AssertionError(f"{name} did not end: {[cell.execution_count for cell in cells]}")


def errors(cells: list) -> list[str]:
    """``name: message`` of each error among the cells' outputs."""
    return [
        f"{output.ename}: {output.evalue}"
        for cell in cells
        for output in cell.outputs
        if output.output_type == "error"
    ]


def latencies(page) -> list[float]:
    """Milliseconds from each key press on the slider to the new picture. The last picture must
    differ from the first.
    """
    slider, picture = (
        page.locator(".widget-slider .noUi-handle").first,
        page.locator("img.widget-image").first,
    )
    slider.scroll_into_view_if_needed()
    picture.wait_for()
    before, taken = pixels(picture), []
    for _ in range(PRESSES):
        page.evaluate(WATCH)
        slider.press("ArrowRight")
        taken.append(page.evaluate("() => window.shown.then(at => at - window.pressed)"))
    after = pixels(picture)
    assert before.shape == after.shape and (before != after).any(axis=2).sum() > 100, (
        "the slider moved, the picture did not"
    )
    return taken


# Script that notes the times of the next key press and of the next picture drawn after it.
WATCH = """() => {
    const image = document.querySelector('img.widget-image');
    window.shown = new Promise(done => {
        const drawn = () => requestAnimationFrame(() => done(performance.now()));
        const changed = () => image.decode().then(drawn, changed);
        const watch = (_, observer) => { observer.disconnect(); changed(); };
        new MutationObserver(watch).observe(image, {attributeFilter: ['src']});
    });
    window.pressed = undefined;
    const press = () => { window.pressed = performance.now(); };
    document.addEventListener('keydown', press, {capture: true, once: true});
}"""


def pixels(picture) -> np.ndarray:
    """``[height, width, 3]`` of an image on the page."""
    return np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("RGB")).astype(int)


def told(name: str, taken: list[float], capsys) -> None:
    """Print the median latency and assert its limit."""
    with capsys.disabled():
        print(
            f"\n{name}: key press to new picture, median of {len(taken)}: "
            f"{statistics.median(taken):.0f} ms (maximum: {max(taken):.0f})"
        )
    assert statistics.median(taken) <= SLOWEST_MS


# --- the notebooks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["00_quickstart", "explorer"])
def test_jupyterlab_runs_a_notebook_and_its_slider_moves_the_picture(name, lab, page, capsys):
    address, notebooks = lab()
    cells = run_all(page, address, notebooks, name)
    assert not errors(cells)
    told(f"{name} in JupyterLab", latencies(page), capsys)


def test_a_notebook_that_raises_is_found_by_run_all(lab, page):
    """Proof that the test of notebooks in JupyterLab can fail."""
    address, notebooks = lab()
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0", execution_count=1)])
    broken.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    (notebooks / "broken.ipynb").write_text(json.dumps(broken))
    assert errors(run_all(page, address, notebooks, "broken")) == [
        "ZeroDivisionError: division by zero"
    ]


def test_voila_serves_the_explorer_as_a_page_that_shows_errors(serve, page, capsys):
    pytest.importorskip("voila", reason="the extra `explorer` is not installed")
    address, _ = serve(["voila", "explorer.ipynb"], "--Voila.token", "/voila/static/voila.js")
    page.goto(f"{address}/?token=secret")
    page.locator("img.widget-image").first.wait_for()
    told("the explorer under Voila", latencies(page), capsys)
    left = page.get_by_label("left", exact=True)
    left.select_option("runs")
    # The page shows the message of an exception in a widget's callback.
    page.get_by_text("choose two strategies").wait_for()
    left.select_option("buddy")
    page.get_by_text("choose two strategies").wait_for(state="hidden")
