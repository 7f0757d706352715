"""Who waits for whom, out of the collectives that each rank has entered in each of its groups.

A rank inside the n-th collective of a group waits for the members that have entered fewer than n in that group. What it
leaves to run in the background it does not wait for. On a GPU all of this is said of the device, in which the ranks'
collectives are done one after another: the host has handed it some that it has not come to yet (`enqueued`), and these
count as not entered.
"""

from typing import Any

from tptrain.watch.black_box import ranks_of

Report = dict[str, Any]
Call = dict[str, Any]  # one collective in a report
Group = tuple[str, tuple[int, ...]]  # axis and ranks
KIND = ("op", "shape", "dtype", "site")  # of a call, the same at every member of the group
Waits = dict[int, dict[int, tuple[Group, int]]]  # rank -> rank that it waits for -> the collective: group and number


class History:
    """The collectives of one rank, by group. The counts are complete; the ring has dropped records of old ones."""

    def __init__(self, report: Report) -> None:
        self.report, self.rank = report, report["rank"]
        self.counts: dict[Group, int] = {group_of(count): count["entered"] for count in report["groups"]}
        self.calls: dict[Group, dict[int, Call]] = {group: {} for group in self.counts}
        for call in report["collectives"]:
            self.calls[group_of(call)][call["number_in_group"]] = call

    def count(self, group: Group) -> int:
        return self.counts.get(group, 0)

    def inside(self) -> Call | None:
        """The collective in which host or device is, if it is in one."""
        calls = reversed(self.report["collectives"])
        return next((call for call in calls if not (call["left"] or call["background"] or call["enqueued"])), None)

    def has_left(self, group: Group, number: int) -> bool:
        """Whether a collective that it entered has returned; so have those whose record the ring has dropped."""
        call = self.calls.get(group, {}).get(number)
        return call is None or call["left"]

    def first_wait(self, group: Group, count: int) -> int | None:
        """The first of its collectives in which it waits for whoever has entered `count`: not one in the background."""
        calls = self.calls.get(group, {})  # the ring may have dropped a record, though not of the few in the background
        numbers = range(count + 1, self.count(group) + 1)
        return next((number for number in numbers if number not in calls or not calls[number]["background"]), None)


def group_of(entry: dict[str, Any]) -> Group:
    return entry["axis"], ranks_of(entry["ranks"])


def groups_of(histories: dict[int, History]) -> list[Group]:
    return list(dict.fromkeys(group for own in histories.values() for group in own.counts))


def waits_of(histories: dict[int, History]) -> Waits:
    """For each rank, those that it waits for, each with the collective in which it does."""
    waits: Waits = {rank: {} for rank in histories}
    for group in groups_of(histories):
        by_count: dict[int, list[int]] = {}  # its members: pairs of a thousand would be a million
        for rank in group[1]:
            if rank in histories:
                by_count.setdefault(histories[rank].count(group), []).append(rank)
        for count, others in by_count.items():
            for rank in (rank for ahead in by_count if ahead > count for rank in by_count[ahead]):
                if (number := histories[rank].first_wait(group, count)) is not None:
                    waits[rank] = dict.fromkeys(others, (group, number)) | waits[rank]
    return waits


def cycle(waits: Waits) -> list[int]:
    """Ranks each of which waits for the next, and the last for the first; empty where there are none."""
    remaining = set(waits)
    while sinks := {rank for rank in remaining if not remaining & waits[rank].keys()}:
        remaining -= sinks
    path: list[int] = []
    while remaining:
        rank = min(remaining & waits[path[-1]].keys()) if path else min(remaining)
        if rank in path:
            return path[path.index(rank) :]
        path.append(rank)
    return []


def waiters_of(rank: int, waits: Waits) -> list[int]:
    """The ranks that wait for this one, or for one that does."""
    waiters, before = {rank}, set()
    while waiters != before:
        before = waiters
        waiters = before | {other for other, targets in waits.items() if before & targets.keys()}
    return sorted(waiters - {rank})


def complete_call(own: History, histories: dict[int, History]) -> Call | None:
    """The collective that the rank is inside, if all members have entered it: the rank waits for none of them."""
    call = own.inside()
    if call is None:
        return None
    group, number = group_of(call), call["number_in_group"]
    complete = all(rank in histories and histories[rank].count(group) >= number for rank in group[1])
    return call if complete else None


def first_call_without(rank: int, histories: dict[int, History]) -> Call | None:
    """The first collective in which members wait for a rank that left no report: none of them has left it."""
    calls_without = []
    for group in groups_of(histories):
        if rank in group[1]:
            calls = [call for own in histories.values() for call in own.calls.get(group, {}).values()]
            last = max((call["number_in_group"] for call in calls if call["left"]), default=0)
            calls_without += [call for call in calls if call["number_in_group"] > last]
    return min(calls_without, key=lambda call: call["number"], default=None)
