"""The wheel, installed outside the checkout: everything that the commands need travels with it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel, and the other packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = folder.glob("cortexlab-*.whl")
    python = folder / "env" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    where = subprocess.run(
        [python, "-c", "import cortexlab; print(cortexlab.__file__)"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert Path(where.stdout.strip()).is_relative_to(packages), where.stderr
    return folder / "env" / "bin" / "cortexlab"


def test_bench_runs_from_the_wheel(installed, tmp_path):
    done = subprocess.run(
        [installed, "bench", "--model", "tiny", "--requests", "4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("results/bench-*/rows.parquet"))) == 1


def test_a_shipped_grid_runs_by_its_name(installed, tmp_path):
    done = subprocess.run(
        [installed, "sweep", "smoke"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results" / "smoke" / "rows.parquet").exists()


def test_a_grid_that_nobody_knows_is_named_with_those_there_are(installed, tmp_path):
    done = subprocess.run(
        [installed, "sweep", "nothing"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        "'nothing'" in done.stderr
        and "quickstart" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_lab_copies_the_notebooks_and_opens_them(installed, tmp_path):
    share = Path(sys.prefix) / "share" / "jupyter"
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--port=18997",
        "--IdentityProvider.token=t",
        f"--app-dir={share / 'lab'}",
    ]
    environment = os.environ | {"HOME": str(tmp_path), "JUPYTER_PATH": str(share)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [installed, "lab", *options], cwd=tmp_path, stdout=log, stderr=log, env=environment
        )
        try:
            text = _answer("http://127.0.0.1:18997/api/contents?token=t", server)
        finally:
            server.terminate()
            server.wait(30)
    assert "00_quickstart.ipynb" in text and "explorer.ipynb" in text
    assert (tmp_path / "notebooks" / "00_quickstart.ipynb").read_bytes() == (
        ROOT / "notebooks" / "00_quickstart.ipynb"
    ).read_bytes()
    assert (tmp_path / "experiments" / "quickstart.yaml").exists()


def _answer(address: str, server: subprocess.Popen) -> str:
    for _ in range(240):
        assert server.poll() is None, "JupyterLab ended"
        try:
            with urllib.request.urlopen(address) as page:
                return page.read().decode()
        except OSError:
            time.sleep(0.25)
    raise AssertionError("JupyterLab does not answer")
