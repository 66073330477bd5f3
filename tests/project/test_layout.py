"""The package's layout: imports go one way, and ``__init__`` files only hand names on."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "arp_hub"
FLOORS = (
    {"_version", "_utils"},
    {"errors"},
    {"schemes", "timing", "effort", "processes"},
    {"plan"},
    {"layers"},
    {"calibration", "runtimes"},
    {"planning", "decomposition", "penalty", "refinement"},
    {"compression"},
    {"models"},
    {"reports"},
    {"hub"},
    {"deployment", "training"},
)
"""From the bottom up: a module imports from floors below its own, or from its own package."""
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def imports(path: Path) -> list[tuple[str, int]]:
    """The packages that a module imports from, each with its line."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    package = list(parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found += [(base[0], node.lineno)] if base else [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("arp_hub", "arp_hub_cli"):
            pytest.fail(
                f"{path.name}:{node.lineno} imports {node.module}: use a relative import, none of the command line"
            )
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    upward = [
        f"line {line}: {name}"
        for name, line in imports(path)
        if name != room(path) and LEVEL[name] >= LEVEL[room(path)]
    ]
    assert not upward


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: str(p.parent.relative_to(PACKAGE)))
def test_init_files_only_hand_names_on(path: Path) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    body = ast.parse(path.read_text()).body
    assert all(isinstance(node, allowed) for node in body)
    assert [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets] in ([], ["__all__"])
