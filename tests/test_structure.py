"""The layering: imports run one way, and the trainer does not need the launcher."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = [
    ["config"],
    ["rows", "run_files"],
    ["watch"],
    ["preflight", "plan", "shared_memory", "native", "files"],
    ["fused", "attention"],
    ["mesh"],
    ["collectives"],
    ["layers"],
    ["linear", "buckets"],
    ["loss", "optim"],
    ["model"],
    ["data", "shards", "metrics", "stop"],
    ["checkpoint"],
    ["train"],
    ["rank"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_one_way() -> None:
    for file in (ROOT / "tptrain").rglob("*.py"):
        name = file.relative_to(ROOT / "tptrain").with_suffix("").parts[0]
        if name == "__init__":
            continue
        for module in _imports(file):
            parts = module.split(".")
            if parts[0] == "tptrain" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != name:
                assert LEVEL[parts[1]] < LEVEL[name], f"{file} imports {module}"


def test_only_main_knows_both_sides() -> None:
    for file in (ROOT / "tptrain").rglob("*.py"):
        if file.name != "__main__.py":
            assert not any(module.split(".")[0] in ("launch", "submitit") for module in _imports(file)), file
    for file in (ROOT / "launch").rglob("*.py"):
        inside = {module for module in _imports(file) if module.split(".")[0] == "tptrain"}
        free = ("tptrain.config", "tptrain.rows", "tptrain.run_files", "tptrain.watch")  # of torch
        assert all(module.startswith(free) for module in inside - {"tptrain"}), file


def test_what_the_launcher_imports_needs_no_torch() -> None:
    for pattern in ("config/*.py", "watch/*.py", "rows.py", "run_files.py"):
        for file in (ROOT / "tptrain").glob(pattern):
            assert not any(module.split(".")[0] == "torch" for module in _imports(file)), file


def test_the_environment_is_read_in_the_mesh_and_launch_only() -> None:
    for file in (ROOT / "tptrain").rglob("*.py"):
        if file.name not in ("mesh.py",):
            text = file.read_text().replace("os.environ.setdefault(", "")
            assert "os.environ" not in text, file
            assert "getenv" not in text, file


def test_files_are_short() -> None:
    for folder in ("tptrain", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 350, file
