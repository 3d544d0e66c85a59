"""The package has floors: a module imports from floors below its own only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cortexlab"
FLOORS = (  # from the ground up; folders of one floor do not import each other
    {"errors", "metrics"},
    {"allocators", "host"},
    {"options", "workloads"},
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
    """``(importing file, its folder, imported folder)`` of every import, also inside functions. A
    module at the root counts as a folder.
    """
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = imported_by(node, parts) if isinstance(node, IMPORT) else []
            yield from (("/".join(parts), parts[0], name[0]) for name in names if name)


IMPORT = ast.Import | ast.ImportFrom


def imported_by(node: IMPORT, parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Names inside the package that ``node`` of the file ``parts`` imports, in parts."""
    aliases = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level:
        base = parts[: len(parts) - node.level]
        return [(*base, *name.split(".")) for name in ([node.module] if node.module else aliases)]
    found = [node.module] if isinstance(node, ast.ImportFrom) else aliases
    split = [tuple(name.split(".")) for name in found]
    return [inner for package, *inner in split if package == "cortexlab"]


def test_imports_go_down_only():
    seen = [(file, folder, below) for file, folder, below in imports() if folder != below]
    assert len(seen) > 100
    assert [each for each in seen if FLOOR_OF[each[1]] <= FLOOR_OF[each[2]]] == []


@pytest.mark.parametrize("folder", NO_MLX)
def test_a_folder_of_bookkeeping_loads_no_mlx(folder):
    files = sorted((PACKAGE / folder).glob("*.py"))
    modules = [f"cortexlab.{folder}.{file.stem}" for file in files if file.stem != "__init__"]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; "
        "print('mlx.core' in sys.modules)"
    )
    assert printed_by(code) == "False"


def test_the_engine_loads_mlx():
    """The test of bookkeeping can fail."""
    code = "import sys, cortexlab.engine.engine; print('mlx.core' in sys.modules)"
    assert printed_by(code) == "True"


def printed_by(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
