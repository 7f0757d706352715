"""The house: imports run one way, room by room, and the trainer does not need the launcher."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A room imports from the rooms before it, and from itself. The first four know no torch.
ROOMS = ["config", "records", "watch", "models", "parallel", "ops", "nn", "hf", "optim", "data", "checkpoint"]
ROOMS += ["generate", "train", "plan", "verify", "run"]
COMMANDS = "commands"  # which alone knows the launcher too
NO_TORCH = ROOMS[:4]


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_imports_run_one_way() -> None:
    for level, room in enumerate(ROOMS):
        allowed = {f"tptrain.{name}" for name in ROOMS[: level + 1]}
        for file in _files(f"tptrain/{room}"):
            for module in _imports(file):
                parts = module.split(".")
                if parts[0] == "tptrain" and len(parts) > 1 and parts[1] != "__version__":
                    assert ".".join(parts[:2]) in allowed, f"{file} imports {module}"
                assert parts[0] != "torch" or room not in NO_TORCH, f"{file} imports {module}"
                assert parts[0] not in ("launch", "submitit"), f"{file} imports {module}"


def test_every_file_is_in_a_room() -> None:
    outside = {file.name for file in (ROOT / "tptrain").glob("*.py")}
    assert outside == {"__init__.py", "__main__.py"}
    assert {folder.name for folder in (ROOT / "tptrain").iterdir() if list(folder.glob("*.py"))} == {*ROOMS, COMMANDS}


def test_the_launcher_knows_no_torch() -> None:
    free = tuple(f"tptrain.{room}" for room in NO_TORCH)
    for file in _files("launch"):
        inside = {module for module in _imports(file) if module.split(".")[0] == "tptrain"}
        assert all(module.startswith(free) for module in inside - {"tptrain"}), file


def test_the_environment_is_read_in_run_and_launch_only() -> None:
    for file in _files("tptrain"):
        if file.parent.name != "run":
            text = file.read_text().replace("os.environ.setdefault(", "")
            assert "os.environ" not in text, file
            assert "getenv" not in text, file


def test_files_and_functions_are_short() -> None:
    for file in [*_files("tptrain"), *_files("launch")]:
        text = file.read_text()
        assert len(text.splitlines()) <= 350, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{file}: {node.name}"
