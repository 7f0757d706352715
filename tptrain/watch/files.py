"""What the supervisors of an attempt leave in `logs/attempt-NAME`: a report of each rank, and one verdict.

They are the record, for people and for the launcher. Between nodes a file may be seen late: see reporter.py.
"""

import json
from pathlib import Path
from typing import Any

from tptrain.config.load import write_atomically
from tptrain.records.run_dir import events
from tptrain.watch.outcome import Outcome
from tptrain.watch.verdict import Verdict
from tptrain.watch.waits import Report


def folder_of(run_dir: Path, attempt: str) -> Path:
    """Where the ranks of an attempt leave their reports."""
    return run_dir / "logs" / f"attempt-{attempt}"


def read(folder: Path, since: float = 0) -> dict[int, Report]:
    """The reports that ranks have written, by rank; `since`: unix time, before which a report is another run's."""
    reports: dict[int, Report] = {}
    for path in folder.glob("rank-*.json"):
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError):  # just being written
            continue
        if report["time"] >= since:
            reports[report["rank"]] = report
    return reports


def write(folder: Path, judged: Verdict, reports: int, stands_in: bool) -> None:
    """Into verdict.json, beside the reports, out of as many. Two parts of a broken network may both judge: the verdict
    of more reports stays, or else rank 0's. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    other = _read_json(folder / "verdict.json")
    if other is None or reports > other["reports"] or (reports == other["reports"] and not stands_in):
        write_atomically(folder / "verdict.json", json.dumps(vars(judged) | {"reports": reports}))


def written(folder: Path) -> Verdict | None:
    """What `write` left there; None where nothing was judged."""
    content = _read_json(folder / "verdict.json")
    if content is None:
        return None
    values = {name: value for name, value in content.items() if name not in ("kind", "reports")}
    return Verdict(kind=Outcome(content["kind"]), **values)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def nodes(run_dir: Path, attempt: str) -> list[str]:
    """The node of each rank of an attempt, as its start noted them; empty where it did not come that far."""
    starts = [event for event in events(run_dir) if event["event"] == "start" and event["attempt"] == attempt]
    return starts[-1]["nodes"] if starts else []
