"""From what every rank's black box held to one sentence: which rank, on which node, never entered which collective.

All ranks run one program, so the n-th collective of one rank is the n-th of every other (in a group of its own). Hence:
a rank that waits in its n-th waits for one that has entered fewer, and the rank that entered the fewest is the one that
all others wait for; and where the n-th differs in operation, shape or call site, the odd one out did something else.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.run_files import events
from tptrain.watch.outcome import Outcome

Report = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    text: str
    kind: Outcome
    rank: int | None
    node: str | None
    step: int  # the last that was finished


def folder_of(run_dir: Path, attempt: str) -> Path:
    """Where the ranks of an attempt leave their reports."""
    return run_dir / "logs" / f"attempt-{attempt}"


def read(folder: Path, since: float = 0) -> dict[int, Report]:
    """The reports that ranks have written, by rank; `since`: unix time, before which a report is another run's."""
    found: dict[int, Report] = {}
    for path in folder.glob("rank-*.json"):
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError):  # just being written
            continue
        if report["time"] >= since:
            found[report["rank"]] = report
    return found


def nodes(run_dir: Path, attempt: str) -> list[str]:
    """The node of each rank of an attempt, as its start noted them; empty where it did not come that far."""
    starts = [event for event in events(run_dir) if event["event"] == "start" and event["attempt"] == attempt]
    return starts[-1]["nodes"] if starts else []


def judge(reports: dict[int, Report], world: int, placed: list[str]) -> Verdict:
    """Who is to blame, out of at least one report; `placed`: the node of each rank, where known."""
    reports = dict(sorted(reports.items()))  # a folder is listed in any order
    step = max(report["step"] for report in reports.values())
    by_kind: dict[str, list[Report]] = {}
    for report in sorted(reports.values(), key=lambda report: report["time"]):
        by_kind.setdefault(report["cause"]["kind"], []).append(report)

    def blame(kind: Outcome, rank: int, text: str) -> Verdict:
        node = reports[rank]["node"] if rank in reports else (placed[rank] if rank < len(placed) else None)
        return Verdict(f"rank {rank} on {node or 'an unknown node'} {text}", kind, rank, node, step)

    for kind in (*(outcome for outcome in Outcome if outcome.announced), Outcome.BUG):
        if kind in by_kind:
            first = by_kind[kind][0]
            return blame(kind, first["rank"], f"ended after step {first['step']}: {first['cause']['message']}")
    if (odd := _odd_one_out(reports)) is not None:
        return blame(Outcome.MISMATCH, *odd)
    missing = sorted(set(range(world)) - reports.keys())
    died = [report for report in by_kind.get(Outcome.DIED, []) if report["cause"]["signal"] == "SIGKILL"]
    died = died or by_kind.get(Outcome.DIED, [])
    if died:
        return blame(Outcome.DIED, died[0]["rank"], _left_off(died[0], f"was {died[0]['cause']['message']}", reports))
    halted = [report for report in reports.values() if report["cause"].get("stopped")]
    if halted:
        return blame(Outcome.HANG, halted[0]["rank"], _left_off(halted[0], "was stopped (SIGSTOP)", reports))
    if missing:
        awaited = _awaited(missing[0], reports)
        which = f", without entering {awaited}" if awaited else ""
        return blame(Outcome.GONE, missing[0], f"does not answer: its node or its processes are gone{which}")
    if Outcome.HANG not in by_kind:
        first = next(iter(by_kind.get(Outcome.INFRA, reports.values())))
        return blame(Outcome.INFRA, first["rank"], f"ended after step {first['step']}: {first['cause']['message']}")
    return _hang(reports, blame)


def _hang(reports: dict[int, Report], blame: Any) -> Verdict:
    last = min(reports.values(), key=lambda report: report["entered"])
    where = f" (it was at {last['top']})" if last["top"] else ""
    if last["entered"] < max(report["entered"] for report in reports.values()):
        return blame(Outcome.HANG, last["rank"], f"{_never_entered(last, reports)}{where}")
    call = _call(last, last["entered"])
    silent = next(report for report in reports.values() if report["cause"]["kind"] == Outcome.HANG)["cause"]["message"]
    if call is None or call["left"]:
        return blame(Outcome.HANG, last["rank"], f"was {silent}{where}")
    text = f"all ranks entered {_describe(call)} and none came out: the network between them"
    return Verdict(text, Outcome.HANG, None, None, last["step"])


def _left_off(report: Report, how: str, reports: dict[int, Report]) -> str:
    call = _call(report, report["entered"])
    if call is not None and not call["left"]:
        return f"{how} after step {report['step']}, inside {_describe(call)}"
    return f"{how} after step {report['step']} and {_never_entered(report, reports)}"


def _never_entered(report: Report, reports: dict[int, Report]) -> str:
    rank, number = report["rank"], report["entered"] + 1
    calls = [call for other in reports.values() if (call := _call(other, number)) is not None]
    if calls:
        call = next((call for call in calls if rank in call["ranks"]), calls[0])
        waiting = [r["rank"] for r in reports.values() if (c := _call(r, r["entered"])) and not c["left"]]
        waiting = sorted(other for other in waiting if other != rank)
        waits = f", while {_ranks(waiting)} waited" if waiting else ""
        return f"never entered {_describe(call)}{waits}"
    last = _call(report, report["entered"])
    return f"entered no collective after {_describe(last)}" if last else "never entered a collective"


def _awaited(rank: int, reports: dict[int, Report]) -> str | None:
    """The first collective in which a rank that left no report is waited for."""
    calls = [call for report in reports.values() for call in report["collectives"]]
    pending = [call for call in calls if not call["left"] and rank in call["ranks"]]
    return _describe(min(pending, key=lambda call: call["number"])) if pending else None


def _odd_one_out(reports: dict[int, Report]) -> tuple[int, str] | None:
    """The rank whose n-th collective is not that of the others, at the first n where they differ."""
    calls = {rank: {call["number"]: call for call in report["collectives"]} for rank, report in reports.items()}
    for number in sorted(set().union(*calls.values())):
        kinds = {rank: _kind(own[number]) for rank, own in calls.items() if number in own}
        if len(set(kinds.values())) == 1:
            continue
        ranks = _suspects(kinds, calls, number)
        rank = ranks[0]
        others = [other for other, kind in kinds.items() if kind != kinds[rank]]
        usual = next((other for other in others if rank in calls[other][number]["ranks"]), others[0])
        did, expected = calls[rank][number], calls[usual][number]
        following = _kind(calls[usual].get(number + 1)) or _usual([*_kinds_before(calls[usual], number), kinds[usual]])
        if following == kinds[rank]:
            return rank, f"skipped {_describe(expected)} and went on to {_describe(did)}"
        return rank, f"entered {_describe(did)} where rank {usual} entered {_describe(expected)}"
    return None


def _suspects(kinds: dict[int, tuple], calls: dict[int, dict[int, Any]], number: int) -> list[int]:
    """Ranks that are not with the majority; in a tie, those that do not go on as the steps before did."""
    count = Counter(kinds.values())
    (most, times), *rest = count.most_common()
    if not rest or times > rest[0][1]:
        return [rank for rank, kind in kinds.items() if kind != most]
    usual = _usual(_kinds_before(max(calls.values(), key=len), number))
    if usual in kinds.values():
        return [rank for rank, kind in kinds.items() if kind != usual]
    # Both are usual calls: whoever does next what the other does now has skipped nothing.
    ahead = [r for r, kind in kinds.items() if any(_kind(calls[o].get(number + 1)) == kind for o in kinds if o != r)]
    return ahead or list(kinds)


def _kinds_before(own: dict[int, Any], number: int) -> list[tuple]:
    return [_kind(own[n]) for n in sorted(own) if n < number]


def _usual(before: list[tuple]) -> tuple:
    """What followed, earlier in these calls, the longest stretch that is like their end: of a step before, the same."""
    best, found = 0, ()
    for i in range(len(before) - 1, 0, -1):
        length = 0
        while length < i and before[i - 1 - length] == before[-1 - length]:
            length += 1
        if length > best:
            best, found = length, before[i]
    return found


def _kind(call: Any) -> tuple:
    return () if call is None else tuple(call[key] for key in ("op", "shape", "dtype", "axis", "site"))


def _call(report: Report, number: int) -> Any:
    return next((call for call in reversed(report["collectives"]) if call["number"] == number), None)


def _describe(call: Any) -> str:
    shape = f" of {call['shape']} {call['dtype']}" if call["dtype"] != "object" else ""
    return f"collective {call['number']}, {call['op']}{shape} over {call['axis']} {call['ranks']} ({call['site']})"


def _ranks(ranks: list[int]) -> str:
    return (
        f"rank {ranks[0]}"
        if len(ranks) == 1
        else f"ranks {', '.join(map(str, ranks[:8]))}" + (" ..." * (len(ranks) > 8))
    )
