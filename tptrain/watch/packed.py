"""A report as it travels: a group's collectives as texts, a letter for each. And what a judge needs of many reports.

A report in full is a megabyte, nearly all of it the last 4,096 collectives. They are of few kinds: with a letter for
each kind, and compressed, they are some hundred bytes. Where the texts of a group's members agree, a judge reads only
the end of them.
"""

from collections.abc import Iterable
from itertools import accumulate
from operator import itemgetter
from typing import Any

from tptrain.watch.waits import KIND, Call, Report

Packed = dict[str, Any]
Column = tuple[list[Any], str]  # a list's distinct values, sorted, and a letter for each entry: (["a", "b"], "0010")

STATE, NUMBERS = ("left", "background", "enqueued"), ("number", "number_in_group")  # what a rank's own calls hold
FIRST_LETTER = ord("0")
CONTEXT = 2  # collectives before the first that not all members have entered


def pack(report: Report) -> Packed:
    """The same report, its collectives as columns of their groups."""
    by_group: dict[tuple[str, str], list[Call]] = {}
    for call in report["collectives"]:
        by_group.setdefault((call["axis"], call["ranks"]), []).append(call)
    groups = []
    for count in report["groups"]:
        calls = by_group.get((count["axis"], count["ranks"]), [])
        numbers = [call["number_in_group"] for call in calls] or [1, 0]
        columns = {"kind": _column(map(itemgetter(*KIND), calls)), "state": _column(map(itemgetter(*STATE), calls))}
        columns |= {name: _steps([call[name] for call in calls]) for name in NUMBERS}
        groups.append(count | columns | {"first": numbers[0], "last": numbers[-1]})
    return report | {"groups": groups, "collectives": []}


def unpack(reports: dict[int, Packed]) -> dict[int, Report]:
    """What a judge needs of the reports of ranks: of each group the collectives from the last that all its members
    have entered, or all on record where the members have not entered the same; and all from one that has not returned.
    """
    members: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}  # by group, then by rank
    for rank, packed in reports.items():
        for group in packed["groups"]:
            members.setdefault((group["axis"], group["ranks"]), {})[rank] = group
    unpacked = {rank: packed | {"groups": [], "collectives": []} for rank, packed in reports.items()}
    for (axis, ranks), by_rank in members.items():
        name, needed = {"axis": axis, "ranks": ranks}, _first_needed(list(by_rank.values()))
        for rank, group in by_rank.items():
            unpacked[rank]["groups"].append(name | {"entered": group["entered"]})
            unpacked[rank]["collectives"] += [name | call for call in _calls(group, needed)]
    for report in unpacked.values():
        report["collectives"].sort(key=itemgetter("number"))
    return unpacked


def _first_needed(members: list[dict[str, Any]]) -> int:
    """The number in a group from which on a judge needs its members' collectives."""
    common: dict[tuple, str] = {}  # the letter of a kind, whoever entered it
    texts = []  # of each member: its first number, and the kinds from there on
    for group in members:
        kinds, letters = group["kind"]
        own = {_letter(i): common.setdefault(tuple(kind), _letter(len(common))) for i, kind in enumerate(kinds)}
        texts.append((group["first"], letters.translate(str.maketrans(own))))
    start, oldest = min(texts)
    newest = max(texts, key=lambda text: text[0] + len(text[1]))
    course = oldest[: newest[0] - start] + newest[1]  # of the whole group, from `start` on, if its members agree
    agree = all(course.startswith(letters, first - start) for first, letters in texts)
    gapless = all(len(group["kind"][1]) == group["last"] + 1 - group["first"] for group in members)
    return min(min(group["entered"], group["last"]) for group in members) - CONTEXT if agree and gapless else 0


def _calls(group: dict[str, Any], needed: int) -> list[Call]:
    """The collectives from the number `needed` on, or from the first that has not returned."""
    states, letters = group["state"]
    not_returned = [letters.index(_letter(i)) for i, (left, *_) in enumerate(states) if not left]
    start = min([max(needed - group["first"], 0), *not_returned])
    kinds, own = _values(group["kind"], start), _values(group["state"], start)
    numbers = [_sums(group[name], start) for name in NUMBERS]
    names = (*KIND, *STATE, *NUMBERS)
    rows = ((*kind, *state, *pair) for kind, state, *pair in zip(kinds, own, *numbers, strict=True))
    return [dict(zip(names, row, strict=True)) for row in rows]


def _column(values: Iterable[Any]) -> Column:
    values = list(values)
    distinct = sorted(set(values))
    letters = {value: _letter(i) for i, value in enumerate(distinct)}
    return distinct, "".join([letters[value] for value in values])


def _values(column: Column, start: int) -> list[Any]:
    """The column's values from a position on."""
    distinct, letters = column
    return [distinct[ord(letter) - FIRST_LETTER] for letter in letters[start:]]


def _steps(numbers: list[int]) -> Column:
    """Rising numbers: each less the one before, the first less 0. Few of these are distinct."""
    return _column(number - before for before, number in zip([0, *numbers], numbers, strict=False))


def _sums(steps: Column, start: int) -> list[int]:
    """The numbers themselves, from a position on."""
    distinct, letters = steps
    before = sum(step * letters.count(_letter(i), 0, start) for i, step in enumerate(distinct))
    return list(accumulate(_values(steps, start), initial=before))[1:]


def _letter(index: int) -> str:
    return chr(FIRST_LETTER + index)
