"""Files of a run directory that both the trainer and the launcher read: checkpoints, and the history of attempts.

Imports no torch.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

COMMIT = "commit.json"
VERIFICATION, CARD = "verification.json", "verification.md"  # what `verify` leaves

# ---------------------------------------------------------------------------------------------------------- checkpoints


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, committed or not. A folder of any other name is not ours."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first. Says nothing of whether their bytes are still good."""
    return [path for path in step_folders(folder) if (path / COMMIT).exists()]


def newest_checkpoint(run_dir: Path) -> str | None:
    """The name of a run's newest committed checkpoint."""
    names = [path.name for path in committed(run_dir / "checkpoints")]
    return names[-1] if names else None


# ------------------------------------------------------------------------------------------------- history of attempts


def add_event(run_dir: Path, event: dict[str, Any]) -> None:
    """Append to the run's history, logs/attempts.jsonl: what its attempts did, for `status` and for restarts."""
    (run_dir / "logs").mkdir(exist_ok=True)
    with (run_dir / "logs" / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def events(run_dir: Path) -> list[dict[str, Any]]:
    """The run's history, oldest first."""
    try:
        lines = (run_dir / "logs" / "attempts.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    history = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a crash cut it short
            event = json.loads(line)
            if isinstance(event, dict) and {"event", "attempt"} <= event.keys():
                history.append(event)
    return history
