"""From what every rank's black box held to one sentence: which rank, on which node, never entered which collective.

Ranks may run different programs (pipeline stages, experts), so collectives are counted within their group: the n-th
that one member of a group enters is the n-th of every other member. The numbers in the sentences are these. Where the
n-th differs in operation, shape or call site, the odd one out did something else; otherwise the rank to blame is the
one at the end of the chain of ranks that wait for one another (waits.py). Where the evidence is missing or
equal, the sentence says so, and `rank` and `node` are None. A failed device, a killed process and a node that cannot be
reached come before what follows from them: lost peers, an abort in a collective.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from typing import Any

from tptrain.watch.outcome import Outcome
from tptrain.watch.waits import (
    KIND,
    Call,
    Group,
    History,
    Report,
    complete_call,
    cycle,
    first_call_without,
    group_of,
    groups_of,
    waiters_of,
    waits_of,
)


@dataclass(frozen=True)
class Verdict:
    text: str
    kind: Outcome
    rank: int | None
    node: str | None
    step: int  # the last that was finished
    error: str | None = None  # how the rank to blame ended, in its own words


class Absence(Enum):
    """What is known of a rank that left no report, for people."""

    ENDED = "its processes are gone"  # its supervisor's connection was closed, and it did not come back
    CUT_OFF = "its node is gone, or cut off from the others"  # the connection broke: nothing answers there
    NEVER_CAME = "it never came"
    SILENT = "it can be reached, and has sent no report"
    UNKNOWN = "no report of it can be read"  # all that is known without connections


def judge(
    reports: dict[int, Report], world: int, placed: list[str], absent: Mapping[int, Absence] | None = None
) -> Verdict:
    """Who is to blame. `placed`: the node of each rank, where known; `absent`: what is known of ranks without a report,
    those whose connection ended first in front.
    """
    reports = dict(sorted(reports.items()))  # a folder is listed in any order
    step = max((report["step"] for report in reports.values()), default=0)
    missing = dict(absent or {})
    missing |= {rank: Absence.UNKNOWN for rank in range(world) if rank not in reports and rank not in missing}
    by_kind: dict[str, list[Report]] = {}
    for report in sorted(reports.values(), key=lambda report: report["time"]):
        by_kind.setdefault(report["cause"]["kind"], []).append(report)

    def node_of(rank: int) -> str | None:
        return reports[rank]["node"] if rank in reports else (placed[rank] if rank < len(placed) else "") or None

    def blame(kind: Outcome, rank: int, text: str) -> Verdict:
        node, error = node_of(rank), reports[rank]["cause"].get("message") if rank in reports else None
        return Verdict(f"rank {rank} on {node or 'an unknown node'} {text}", kind, rank, node, step, error)

    def blame_nobody(kind: Outcome, text: str) -> Verdict:
        return Verdict(text, kind, None, None, step)

    for kind in (*(outcome for outcome in Outcome if outcome.announced), Outcome.DEVICE, Outcome.BUG):
        if kind in by_kind:
            first = by_kind[kind][0]
            return blame(kind, first["rank"], f"ended after step {first['step']}: {first['cause']['message']}")
    histories = {rank: History(report) for rank, report in reports.items()}
    if (odd := _odd_one_out(histories)) is not None:
        rank, text = odd
        kind = Outcome.MISMATCH
        return blame_nobody(kind, text) if rank is None else blame(kind, rank, text)
    died = by_kind.get(Outcome.DIED, [])
    aborted = [report for report in died if report["cause"]["signal"] == "SIGABRT"]
    killed = [report for report in died if report["cause"]["signal"] == "SIGKILL"]
    killed = killed or [report for report in died if report not in aborted]
    if killed:
        how = f"was {killed[0]['cause']['message']}"
        return blame(Outcome.DIED, killed[0]["rank"], _left_off(histories[killed[0]["rank"]], how, histories))
    halted = [report for report in reports.values() if report["cause"].get("stopped")]
    if halted:
        rank = halted[0]["rank"]
        return blame(Outcome.HANG, rank, _left_off(histories[rank], "was stopped (SIGSTOP)", histories))
    if gone := _gone(missing, {rank: node_of(rank) for rank in missing}, len(reports)):
        call = first_call_without(gone[0], histories)
        which = f", without entering {_describe(call)}" if call else ""
        return blame(Outcome.GONE, gone[0], f"does not answer: {missing[gone[0]].value}{which}")
    if away := _not_met(reports, missing):
        places = {node_of(rank) for rank in away}
        if len(places) == 1:
            others = f", and so did {_ranks(away[1:])}" if away[1:] else ""
            kind = Outcome.HANG if away[0] in reports else Outcome.GONE
            return blame(kind, away[0], f"kept the others waiting in the rendezvous{others}")
        where = ", ".join(sorted(place or "an unknown node" for place in places))
        return blame_nobody(Outcome.INFRA, f"{_ranks(away)}, on {where}, kept the others waiting in the rendezvous")
    if missing:
        return blame_nobody(Outcome.HANG if Outcome.HANG in by_kind else Outcome.INFRA, _incomplete(missing, by_kind))
    if aborted:
        return _aborted(aborted, histories, blame, blame_nobody)
    if Outcome.HANG not in by_kind:
        first = next(iter(by_kind.get(Outcome.INFRA, reports.values())))
        place = f"rank {first['rank']} on {first['node']}"
        return blame_nobody(Outcome.INFRA, f"{place} ended after step {first['step']}: {first['cause']['message']}")
    return _hang(histories, blame, step)


def _gone(missing: Mapping[int, Absence], nodes: Mapping[int, str | None], reports: int) -> list[int]:
    """The ranks to blame among those without a report, if all of these are on one node and there is no doubt that it is
    this one that fails. Whoever is cut off from half of the others sees the same as they do.
    """
    first = [rank for rank, how in missing.items() if how is Absence.ENDED]
    if not first and reports > len(missing):
        first = [rank for rank, how in missing.items() if how is Absence.CUT_OFF]
    return first if len(set(nodes.values())) == 1 else []


def _not_met(reports: dict[int, Report], missing: Mapping[int, Absence]) -> list[int]:
    """The ranks for which others waited in a rendezvous that failed; none where it failed soon, or all are alike."""
    if any(report["phase"] != "rendezvous" for report in reports.values()):
        return []
    idle = [rank for rank, report in reports.items() if report["silent"] > report["allowed"] / 2]
    away = [rank for rank in idle if not reports[rank]["arrived"]]
    if any(report["lasted"] > report["allowed"] / 2 for report in reports.values()):
        away += [rank for rank, how in missing.items() if how is Absence.NEVER_CAME]
    if not away and 0 in reports and 0 not in idle:
        away = idle  # whoever waits there shows signs of life, unless it cannot reach rank 0
    return sorted(away) if len(away) < len(reports) + len(missing) else []


def _incomplete(missing: Mapping[int, Absence], by_kind: dict[str, list[Report]]) -> str:
    """Why nobody is to blame where reports are missing that could tell."""
    by_text: dict[str, list[int]] = {}
    for rank, how in sorted(missing.items()):
        by_text.setdefault(how.value, []).append(rank)
    reasons = "; ".join(f"{_ranks(ranks)} left no report: {text}" for text, ranks in by_text.items())
    first = next((by_kind[kind][0] for kind in (Outcome.HANG, Outcome.INFRA, Outcome.DIED) if kind in by_kind), None)
    seen = f". Rank {first['rank']} on {first['node']}: {first['cause']['message']}" if first else ""
    return f"evidence is missing, and nobody is to blame for sure: {reasons}{seen}"


def _aborted(aborted: list[Report], histories: dict[int, History], blame: Any, blame_nobody: Any) -> Verdict:
    """Of ranks that ended themselves by SIGABRT, as libraries do also where they lose a peer in a collective."""
    first = aborted[0]
    text = _left_off(histories[first["rank"]], f"was {first['cause']['message']}", histories)
    if len({report["node"] for report in aborted}) == 1 and histories[first["rank"]].inside() is None:
        return blame(Outcome.DIED, first["rank"], text)
    place = f"rank {first['rank']} on {first['node']}"
    return blame_nobody(Outcome.DIED, f"no rank is to blame for sure: {place} {text}, as where a peer is lost")


def _hang(histories: dict[int, History], blame: Any, step: int) -> Verdict:
    def blame_nobody(text: str) -> Verdict:
        return Verdict(text, Outcome.HANG, None, None, step)

    waits = waits_of(histories)
    if loop := cycle(waits):
        pairs = zip(loop, [*loop[1:], loop[0]], strict=True)
        texts = [f"rank {rank} for rank {other} in {_nth(*waits[rank][other], histories)}" for rank, other in pairs]
        return blame_nobody(f"ranks wait for each other, and none of them alone is to blame: {'; '.join(texts)}")
    targets = {other for others in waits.values() for other in others}
    sinks = sorted(rank for rank in targets if not waits[rank])  # others wait for them, and they wait for nobody
    calls = {rank: call for rank in sinks or histories if (call := complete_call(histories[rank], histories))}
    if calls and calls.keys() >= set(sinks):
        return blame_nobody(_network_fault(next(iter(calls.values())), histories))
    reports = [own.report for own in histories.values()]
    silent = next(report for report in reports if report["cause"]["kind"] == Outcome.HANG)
    if len(sinks) == 1 or len(reports) == 1:
        rank = sinks[0] if sinks else silent["rank"]
        top = histories[rank].report["top"]
        text = _never_entered(histories[rank], histories) if sinks else f"was {silent['cause']['message']}"
        return blame(Outcome.HANG, rank, text + (f" (it was at {top})" if top else ""))
    texts = [f"rank {rank} {_never_entered(histories[rank], histories)}" for rank in sinks]
    texts = texts or [f"none waits for another; rank {silent['rank']} was {silent['cause']['message']}"]
    return blame_nobody(f"no rank is to blame for sure: {'; '.join(texts)}")


def _network_fault(call: Call, histories: dict[int, History]) -> str:
    """Of a collective that all members have entered."""
    group, number = group_of(call), call["number_in_group"]
    members = "all ranks" if len(group[1]) == len(histories) else _ranks(group[1])
    inside = [rank for rank in group[1] if not histories[rank].has_left(group, number)]
    if len(inside) == len(group[1]):
        return f"{members} entered {_describe(call)} and none came out: the network between them"
    return f"{members} entered {_describe(call)}, {_ranks(inside)} did not come out: the network or a rank itself"


def _left_off(own: History, how: str, histories: dict[int, History]) -> str:
    if (call := own.inside()) is not None:
        return f"{how} after step {own.report['step']}, inside {_describe(call)}"
    return f"{how} after step {own.report['step']} and {_never_entered(own, histories)}"


def _never_entered(own: History, histories: dict[int, History]) -> str:
    """Of the collectives that others have entered without this rank, the one that they came to first."""
    ahead = [
        (call["number"] if (call := other.calls[group].get(own.count(group) + 1)) else float("inf"), group)
        for other in histories.values()
        for group in other.counts
        if own.rank in group[1] and other.count(group) > own.count(group)
    ]
    if ahead:
        _, group = min(ahead)
        waiters = waiters_of(own.rank, waits_of(histories))
        clause = f", while {_ranks(waiters)} waited" if waiters else ""
        number = own.count(group) + 1
        enqueued = own.calls.get(group, {}).get(number)
        how = "never entered" if enqueued is None else "enqueued, and its device never came to,"
        return f"{how} {_nth(group, number, histories)}{clause}"
    calls = own.report["collectives"]
    return f"entered no collective after {_describe(calls[-1])}" if calls else "never entered a collective"


def _odd_one_out(histories: dict[int, History]) -> tuple[int | None, str] | None:
    """The member of a group whose n-th collective is not that of the others, at the first n where they differ; None
    for the rank where the others may as well be wrong.
    """
    differences = []
    for group in groups_of(histories):
        calls = {rank: histories[rank].calls.get(group, {}) for rank in group[1] if rank in histories}
        for number in sorted(set().union(*calls.values())):
            kinds = {rank: _kind(own[number]) for rank, own in calls.items() if number in own}
            if len(set(kinds.values())) > 1:
                differences.append((min(calls[rank][number]["number"] for rank in kinds), number, kinds, calls))
                break
    if not differences:
        return None
    _, number, kinds, calls = min(differences, key=lambda difference: difference[0])
    suspects = _suspects(kinds, calls, number)
    rank = suspects[0]
    usual = next(other for other, kind in kinds.items() if kind != kinds[rank])
    actual, expected = _describe(calls[rank][number]), _describe(calls[usual][number])
    if len(suspects) == len(kinds):
        return None, f"rank {rank} entered {actual} where rank {usual} entered {expected}: which is wrong is not known"
    next_kind = _kind(calls[usual].get(number + 1)) or _usual([*_kinds_before(calls[usual], number), kinds[usual]])
    if next_kind == kinds[rank]:
        return rank, f"skipped {expected} and went on to {actual}"
    return rank, f"entered {actual} where rank {usual} entered {expected}"


def _suspects(kinds: dict[int, tuple], calls: dict[int, dict[int, Call]], number: int) -> list[int]:
    """Ranks that are not with the majority; in a tie, those that do not go on as the steps before did; all, where
    nothing tells them apart.
    """
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


def _kinds_before(own: dict[int, Call], number: int) -> list[tuple]:
    return [_kind(own[n]) for n in sorted(own) if n < number]


def _usual(before: list[tuple]) -> tuple:
    """What followed, earlier in these calls, the longest stretch that is like their end: of a step before, the same."""
    best, follower = 0, ()
    for i in range(len(before) - 1, 0, -1):
        length = 0
        while length < i and before[i - 1 - length] == before[-1 - length]:
            length += 1
        if length > best:
            best, follower = length, before[i]
    return follower


def _kind(call: Call | None) -> tuple:
    return () if call is None else itemgetter(*KIND)(call)


def _describe(call: Call) -> str:
    """The number is the one within the group."""
    shape = f" of {call['shape']} {call['dtype']}" if call["dtype"] != "object" else ""
    group = f"{call['axis']} [{_few(group_of(call)[1])}]"
    return f"collective {call['number_in_group']}, {call['op']}{shape} over {group} ({call['site']})"


def _nth(group: Group, number: int, histories: dict[int, History]) -> str:
    """A collective of a group, as whichever member still has a record of it describes it."""
    records = (histories[rank].calls.get(group, {}).get(number) for rank in group[1] if rank in histories)
    call = next(filter(None, records), None)
    return _describe(call) if call else f"collective {number} over {group[0]} [{_few(group[1])}]"


def _ranks(ranks: Sequence[int]) -> str:
    return f"ranks {_few(ranks)}" if len(ranks) > 1 else f"rank {ranks[0]}"


def _few(ranks: Sequence[int]) -> str:
    """All ranks by number, or the first three and the last: a group may have a thousand."""
    return ", ".join(map(str, ranks if len(ranks) <= 8 else (*ranks[:3], "...", ranks[-1])))
