"""A report as it travels: collectives as numbers, the text of each distinct one once. And what a judge needs of many.

A report in full is a megabyte, nearly all of it the last 4,096 collectives. Packed and compressed it is some kilobytes.
Of 1,024 of these a judge reads what its judgement can depend on: where all members of a group have entered the same
collectives, the last few.
"""

from itertools import accumulate
from typing import Any

Report = dict[str, Any]
Packed = dict[str, Any]

NUMBERS = ("number", "number_in_group")
GROUP = ("axis", "ranks")
KIND = ("op", "shape", "dtype", "site")  # the same at every member of a group; what else a record holds is a rank's own
NO_RECORD = -1
CONTEXT = 8  # collectives before the first that not all members have entered


def pack(report: Report) -> Packed:
    """The same report without what repeats itself."""
    by_group: dict[Any, list[dict[str, Any]]] = {}
    for call in report["collectives"]:
        by_group.setdefault((call["axis"], tuple(call["ranks"])), []).append(call)
    kinds: dict[tuple, int] = {}
    states: dict[tuple, int] = {}
    groups = []
    for count in report["groups"]:
        calls = by_group.get((count["axis"], tuple(count["ranks"])), [])
        first = calls[0]["number_in_group"] if calls else 1
        size = calls[-1]["number_in_group"] + 1 - first if calls else 0
        columns = {"kind": [NO_RECORD] * size, "state": [NO_RECORD] * size, "step": [0] * size}
        before = 0
        for call in calls:
            i = call["number_in_group"] - first
            state = tuple((name, call[name]) for name in call if name not in (*NUMBERS, *GROUP, *KIND))
            columns["kind"][i] = kinds.setdefault(tuple(call[name] for name in KIND), len(kinds))
            columns["state"][i] = states.setdefault(state, len(states))
            columns["step"][i], before = call["number"] - before, call["number"]
        groups.append(count | {"ranks": _ends(count["ranks"]), "first": first, "columns": columns})
    rest = {name: value for name, value in report.items() if name != "collectives"}
    return rest | {"groups": groups, "kinds": list(kinds), "states": [dict(state) for state in states]}


def unpack(reports: dict[int, Packed]) -> dict[int, Report]:
    """What a judge needs of the reports of ranks: of each group the collectives from the last that all its members
    have entered, or all on record where the members have not entered the same; and each that has not returned.
    """
    kinds: dict[tuple, int] = {}  # the ranks' tables made one
    members: dict[Any, dict[int, _Calls]] = {}  # by group
    for rank, packed in reports.items():
        numbers = [*(kinds.setdefault(tuple(kind), len(kinds)) for kind in packed["kinds"]), NO_RECORD]
        for group in packed["groups"]:
            members.setdefault((group["axis"], tuple(_all(group["ranks"]))), {})[rank] = _Calls(group, packed, numbers)
    texts = [dict(zip(KIND, kind, strict=True)) for kind in kinds]
    collectives: dict[int, list[dict[str, Any]]] = {rank: [] for rank in reports}
    counts: dict[int, list[dict[str, Any]]] = {rank: [] for rank in reports}
    for (axis, ranks), by_rank in members.items():
        group, needed = {"axis": axis, "ranks": list(ranks)}, _first_needed(list(by_rank.values()))
        for rank, calls in by_rank.items():
            counts[rank].append(group | {"entered": calls.entered})
            collectives[rank] += [group | texts[kind] | own for kind, own in calls.records(needed)]
    names = ("groups", "kinds", "states")
    return {
        rank: {name: value for name, value in packed.items() if name not in names}
        | {"groups": counts[rank], "collectives": sorted(collectives[rank], key=lambda call: call["number"])}
        for rank, packed in reports.items()
    }


class _Calls:
    """The records that one rank has of one group's collectives."""

    def __init__(self, group: dict[str, Any], packed: Packed, numbers: list[int]) -> None:
        columns = group["columns"]
        self.entered, self.first, self.states = group["entered"], group["first"], packed["states"]
        self.kind = [numbers[kind] for kind in columns["kind"]]
        self.state, self.step = columns["state"], columns["step"]
        self.end = self.first + len(self.kind)

    def records(self, needed: int) -> list[tuple[int, dict[str, Any]]]:
        """Kind, and what is the rank's own: of the collectives from number `needed` on, and of those not returned."""
        start = min(max(needed - self.first, 0), len(self.kind))
        pending = {state for state in set(self.state) - {NO_RECORD} if not self.states[state]["left"]}
        positions = [i for i in range(start) if self.state[i] in pending] if pending else []
        number = list(accumulate(self.step))
        return [
            (self.kind[i], {"number": number[i], "number_in_group": self.first + i} | self.states[self.state[i]])
            for i in [*positions, *range(start, len(self.kind))]
            if self.kind[i] != NO_RECORD
        ]


def _first_needed(members: list[_Calls]) -> int:
    """The number in a group from which on a judge needs its members' collectives."""
    oldest, newest = min(members, key=lambda calls: calls.first), max(members, key=lambda calls: calls.end)
    kinds = oldest.kind[: max(newest.first - oldest.first, 0)] + newest.kind
    for calls in members:
        start = calls.first - oldest.first
        if kinds[start : start + len(calls.kind)] != calls.kind:
            return 0
    return min(min(calls.entered, calls.end - 1) for calls in members) - CONTEXT


def _ends(ranks: list[int]) -> str | list[int]:
    """Ranks at even distances by their ends: a group of all ranks must not be as long as the world, at every rank."""
    step = max(1, ranks[1] - ranks[0]) if len(ranks) > 1 else 1
    even = range(ranks[0], ranks[-1] + 1, step)
    return f"{even.start}:{even.stop}:{step}" if list(even) == ranks else ranks


def _all(ranks: str | list[int]) -> list[int]:
    return list(range(*map(int, ranks.split(":")))) if isinstance(ranks, str) else ranks
