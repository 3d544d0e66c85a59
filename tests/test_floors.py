"""The house has floors: a folder imports from those below it, never from one above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "cortexlab"
FLOORS = (  # from the ground up; folders of one floor do not see each other
    {"errors", "metrics"},
    {"allocators", "host"},
    {"workloads"},
    {"scheduler"},
    {"engine"},
    {"replay"},
    {"bench"},
    {"lab"},
    {"plots"},
    {"results"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
NO_MLX = "allocators", "workloads", "scheduler", "replay", "plots"


def imports():
    """``(importing file, room of the importing file, room imported)``, of imports inside functions
    too.
    """
    for file in HOUSE.rglob("*.py"):
        parts = file.relative_to(HOUSE).with_suffix("").parts
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = parts[: len(parts) - node.level]
                names = (
                    [(*base, *node.module.split("."))]
                    if node.module
                    else [(*base, alias.name) for alias in node.names]
                )
            elif isinstance(node, ast.ImportFrom | ast.Import):
                found = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                names = [
                    tuple(name.split(".")[1:])
                    for name in found
                    if name.split(".")[0] == "cortexlab"
                ]
            else:
                continue
            yield from (
                (file, parts[0], name[0]) for name in names if name and parts[0] != "__init__"
            )


def test_imports_go_down_only():
    seen = [
        (str(file.relative_to(HOUSE)), room, below)
        for file, room, below in imports()
        if room != below
    ]
    assert len(seen) > 100
    assert [each for each in seen if FLOOR_OF[each[1]] <= FLOOR_OF[each[2]]] == []


@pytest.mark.parametrize("room", NO_MLX)
def test_a_room_above_the_wall_loads_no_mlx(room):
    modules = [
        f"cortexlab.{room}.{file.stem}"
        for file in sorted((HOUSE / room).glob("*.py"))
        if file.stem != "__init__"
    ]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; "
        "print('mlx.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_engine_does_load_mlx_so_the_test_above_can_fail():
    code = "import sys, cortexlab.engine.engine; print('mlx.core' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "True"
    )
