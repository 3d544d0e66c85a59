"""The package has floors: a module imports from floors below its own only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cortexlab

PACKAGE = Path(__file__).parent.parent / "cortexlab"
FLOORS = (  # from the ground up; folders of one floor do not import each other
    {"errors", "metrics"},
    {"allocators", "host"},
    {"options", "workloads"},
    {"scheduler", "answer"},
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
            for name in imported_by(node, parts):
                yield "/".join(parts), parts[0], name


def imported_by(node: ast.AST, parts: tuple[str, ...]) -> list[str]:
    """Folders of the package, and other packages, that ``node`` of the file ``parts`` imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [node.module] if node.module else [alias.name for alias in node.names]
        base = parts[: len(parts) - node.level] if node.level else ()
        return [(*base, *name.split("."))[0] for name in names]
    by_name = isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func)
    return ["import_module"] if by_name else []


def test_imports_go_down_only():
    seen = [(file, folder, below) for file, folder, below in imports() if folder != below]
    inner = [each for each in seen if each[2] in FLOOR_OF]
    assert len(inner) > 100
    assert [each for each in inner if FLOOR_OF[each[1]] <= FLOOR_OF[each[2]]] == []


def test_no_import_hides_from_the_test_of_floors():
    hidden = {(file, name) for file, _, name in imports() if name in ("cortexlab", "import_module")}
    assert hidden == {("allocators/own", "import_module")}, "a user's own allocator, by its name"


def test_no_import_in_a_function_of_bookkeeping_names_mlx():
    named = [each for each in imports() if each[1] in NO_MLX and each[2] in ("mlx", "mlx_lm")]
    assert named == []


def test_every_name_that_the_package_loads_late_comes_from_its_own_file():
    for name, path in cortexlab._NEED_MLX.items():
        assert getattr(cortexlab, name).__module__ == f"cortexlab{path}"


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
