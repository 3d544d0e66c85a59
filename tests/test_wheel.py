"""The wheel, installed outside the checkout, holds all files that the commands need."""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# PYTHONPATH may name the checkout, which would then be imported instead of the wheel.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The command `cortexlab` of a new environment with the wheel, which sees the other packages of
    the current one.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = run(["git", "ls-files", "-co", "--exclude-standard", "-z"], ROOT)
    assert listed.returncode == 0, listed.stderr
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run([*pip, *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = folder.glob("cortexlab-*.whl")
    python = folder / "env" / "bin" / "python"
    install = ["--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    where = run([python, "-c", "import cortexlab; print(cortexlab.__file__)"], folder)
    assert Path(where.stdout.strip()).is_relative_to(packages), where.stderr
    return folder / "env" / "bin" / "cortexlab"


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)


def test_bench_runs_from_the_wheel(installed, tmp_path):
    done = run([installed, "bench", "--model", "tiny", "--requests", "4"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("results/bench-*/rows.parquet"))) == 1


def test_a_shipped_sweep_runs_by_its_name(installed, tmp_path):
    done = run([installed, "sweep", "smoke"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results" / "smoke" / "rows.parquet").exists()


def test_an_unknown_sweep_is_refused_with_the_names_of_the_shipped_sweeps(installed, tmp_path):
    done = run([installed, "sweep", "nothing"], tmp_path)
    assert done.returncode == 2
    assert "'nothing'" in done.stderr and "quickstart" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_lab_copies_the_notebooks_and_serves_them(installed, tmp_path):
    share = Path(sys.prefix) / "share" / "jupyter"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    options += ["--IdentityProvider.token=t", f"--app-dir={share / 'lab'}"]
    environment = ENVIRONMENT | {"HOME": str(tmp_path), "JUPYTER_PATH": str(share)}
    with (tmp_path / "log").open("w") as log:
        where = {"cwd": tmp_path, "stdout": log, "stderr": log, "env": environment}
        server = subprocess.Popen([installed, "lab", *options], **where)
        try:
            text = _answer(f"http://127.0.0.1:{port}/api/contents?token=t", server)
        finally:
            server.terminate()
            server.wait(30)
    assert "00_quickstart.ipynb" in text and "explorer.ipynb" in text
    copied, name = tmp_path / "notebooks", "00_quickstart.ipynb"
    assert (copied / name).read_bytes() == (ROOT / "notebooks" / name).read_bytes()
    assert (tmp_path / "experiments" / "quickstart.yaml").exists()


def _answer(address: str, server: subprocess.Popen) -> str:
    """Text at ``address``, asked for again until ``server`` answers, a minute long at most."""
    for _ in range(240):
        assert server.poll() is None, "JupyterLab ended"
        try:
            with urllib.request.urlopen(address) as page:
                return page.read().decode()
        except OSError:
            time.sleep(0.25)
    raise AssertionError("JupyterLab does not answer")
