"""Who is to blame, out of made-up reports: what `verdict.judge` may and may not conclude.

The numbers in its sentences count within the group.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch

from tests.models import training
from tptrain.config import Config, ModelConfig
from tptrain.parallel.collectives import all_reduce_
from tptrain.parallel.communicators import Finish, Nobody, Op
from tptrain.parallel.group import Group
from tptrain.parallel.mesh import Mesh, tp_grid
from tptrain.train.trainer import Trainer
from tptrain.watch.black_box import SLOTS, BlackBox, ranks_of, text_of
from tptrain.watch.files import nodes, read
from tptrain.watch.outcome import Outcome
from tptrain.watch.packed import pack, unpack
from tptrain.watch.supervisor import Supervisor
from tptrain.watch.verdict import Absence, Report, Verdict, judge

# The collectives of a step of two layers, by letter: operation, shape, axis and call site.
CALLS = {
    "E": ("all_reduce", "(16, 16)", "tp", "layers.py:161 forward"),
    "A": ("all_reduce", "(16, 16)", "tp", "linear.py:89 forward < linear.py:55 row_parallel < model.py:67 forward"),
    "F": ("all_reduce", "(16, 16)", "tp", "linear.py:89 forward < linear.py:55 row_parallel < model.py:92 forward"),
    "L": ("all_gather", "(1, 2, 16)", "tp", "loss.py:28 _joined"),
    "B": ("all_reduce", "(16, 16)", "tp", "linear.py:80 backward"),
    "G": ("all_reduce", "(4096,)", "dp", "optim.py:61 _begin"),
    "N": ("all_gather", "(1, 2)", "tp", "optim.py:73 norm"),
    "s": ("all_gather", "(1, 2, 15)", "tp", "loss.py:28 _joined"),  # another shape than L's
    "P": ("transfer", "(16, 16)", "pp", "pipeline.py:40 transfer"),
}
STEP = "EAFAFLBBBGN"


def report(
    rank: int, calls: str = "", kind: str = "hang", *, tp: int = 2, world: int = 4, inside: bool = True, **more: Any
) -> Report:
    """Of a rank that entered these calls, all but the last of which returned; `more`: its `time`, `step` and cause."""
    groups = {"tp": list(range(rank // tp * tp, rank // tp * tp + tp)), "dp": list(range(rank % tp, world, tp))}
    return report_of(rank, [(letter, groups[CALLS[letter][2]]) for letter in calls], kind, inside, world, tp, **more)


def report_of(
    rank: int, calls: list[tuple[str, list[int]]], kind: str, inside: bool, world: int, per_node: int, **more: Any
) -> Report:
    """The same of calls that each come with the ranks of its group; a letter and `*`: in the background."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    noted = []
    for number, (letter, ranks) in enumerate(calls, 1):
        op, shape, axis, site = CALLS[letter[0]]
        counts[axis, tuple(ranks)] += 1
        call = {"number": number, "number_in_group": counts[axis, tuple(ranks)], "axis": axis, "ranks": text_of(ranks)}
        background = letter.endswith("*")
        left = not background and (number < len(calls) or not inside)
        call |= {"op": op, "shape": shape, "dtype": "float32", "site": site}
        call |= {"left": left, "background": background, "enqueued": False}
        noted.append(call)
    return {
        "rank": rank,
        "world": world,
        "node": f"n{rank // per_node}",
        "time": more.pop("time", 100.0),
        "phase": more.pop("phase", "step"),
        "silent": more.pop("silent", 0.1),
        "allowed": 300.0,
        "lasted": more.pop("lasted", 310.0),
        "arrived": more.pop("arrived", True),
        "step": more.pop("step", len(calls) // len(STEP)),
        "entered": len(calls),
        "cause": {"kind": kind, "message": f"made-up {kind}"} | more,
        "top": "",
        "groups": [{"axis": axis, "ranks": text_of(ranks), "entered": n} for (axis, ranks), n in counts.items()],
        "collectives": noted,
    }


def judged(*reports: Report, placed: list[str] | None = None, absent: dict[int, Absence] | None = None) -> Verdict:
    """In whatever order the reports come, and packed as they travel: the verdict is the same."""
    world = reports[0]["world"]
    forward = judge({r["rank"]: r for r in reports}, world, placed or [], absent)
    backward = judge({r["rank"]: r for r in reversed(reports)}, world, placed or [], absent)
    assert (forward.kind, forward.rank, forward.node) == (backward.kind, backward.rank, backward.node)
    travelled = unpack({r["rank"]: json.loads(json.dumps(pack(r))) for r in reports})
    assert judge(travelled, world, placed or [], absent) == forward
    return forward


# ------------------------------------------------------------------------------------------------------ kinds, priority

KILLED: dict[str, Any] = {"kind": "died", "signal": "SIGKILL"}
ORDER: list[dict[str, Any]] = [
    *({"kind": kind} for kind in ("cancelled", "stopped", "user", "diverged", "disk", "device", "bug")),
    KILLED,
    {"kind": "died", "signal": "SIGSEGV"},
    {"kind": "hang", "stopped": True},
    {"kind": "died", "signal": "SIGABRT", "inside": False},
    {"kind": "infra"},
    {"kind": "waiting"},
]


@pytest.mark.parametrize("index", range(len(ORDER) - 1))
def test_a_cause_outweighs_its_consequences(index: int) -> None:
    """Also where those were reported first, on lower ranks."""
    cause, others = ORDER[index], ORDER[index + 1 :]
    consequences = [report(rank, STEP, **other) for rank, other in enumerate(others)]
    world = len(others) + 1
    verdict = judged(*({**r, "world": world} for r in [*consequences, report(world - 1, STEP, time=101.0, **cause)]))
    assert (verdict.kind, verdict.rank) == (cause["kind"], None if cause["kind"] == "infra" else world - 1)


def test_of_two_that_died_it_is_the_first() -> None:
    verdict = judged(report(0, STEP, time=102.0, **KILLED), report(1, STEP, time=101.0, **KILLED, world=2))
    assert verdict.rank == 1


def test_an_error_names_step_and_message() -> None:
    verdict = judged(report(0, STEP, "infra", world=2), report(1, STEP, "bug", step=7, message="KeyError: 'x'"))
    text = "rank 1 on n0 ended after step 7: KeyError: 'x'"
    assert verdict == Verdict(text, Outcome.BUG, 1, "n0", 7, "KeyError: 'x'")


# ------------------------------------------------------------------------------------------ missing reports, devices

NODES = ["n0", "n0", "n1", "n1"]
LOST: dict[str, Any] = {"kind": "infra", "message": "lost another rank: connection closed by peer"}


def test_a_rank_whose_processes_are_gone_is_to_blame() -> None:
    reports = [report(rank, STEP + "E", "infra") for rank in (0, 1, 2)]
    verdict = judged(*reports, placed=NODES, absent={3: Absence.ENDED})
    assert (verdict.kind, verdict.rank, verdict.node) == ("gone", 3, "n1")
    assert "without entering collective 11, all_reduce of (16, 16) float32 over tp [2, 3]" in verdict.text
    nowhere = judged(*reports, absent={3: Absence.ENDED})
    assert (nowhere.rank, nowhere.node) == (3, None)
    assert "an unknown node" in nowhere.text


@pytest.mark.parametrize("how", [Absence.SILENT, Absence.UNKNOWN, Absence.NEVER_CAME])
@pytest.mark.parametrize("kind", ["infra", "hang"])
def test_a_report_that_is_only_missing_blames_nobody(how: Absence, kind: str) -> None:
    """Its node can be reached, or there is nothing to tell whether it can; here or there the rank may be well."""
    reports = [report(rank, STEP + "E" * (rank != 1), kind) for rank in (0, 1, 2)]
    verdict = judged(*reports, placed=NODES, absent={} if how is Absence.UNKNOWN else {3: how})
    assert (verdict.kind, verdict.rank, verdict.node) == (kind, None, None)
    assert "evidence is missing" in verdict.text
    assert how.value in verdict.text


def test_whoever_is_cut_off_from_half_of_the_others_does_not_call_them_gone() -> None:
    absent = {2: Absence.CUT_OFF, 3: Absence.CUT_OFF}
    verdict = judged(*(report(rank, STEP, "infra") for rank in (0, 1)), placed=NODES, absent=absent)
    assert (verdict.rank, verdict.node) == (None, None)
    three = [report(rank, STEP, "infra", world=6) for rank in range(4)]
    absent = {4: Absence.CUT_OFF, 5: Absence.CUT_OFF}
    assert judged(*three, placed=[*NODES, "n2", "n2"], absent=absent).node == "n2"
    scattered = judged(*three, placed=[*NODES, "n2", "n3"], absent=absent)
    assert (scattered.rank, scattered.node) == (None, None)


@pytest.mark.parametrize("neighbour", [{"kind": "died", "signal": "SIGABRT"}, LOST, {"kind": "hang"}])
def test_a_failed_device_comes_before_its_neighbours_abort(neighbour: dict[str, Any]) -> None:
    """Whose node reported first, and from within a collective."""
    message = "the device failed: CUDA error: uncorrectable ECC error encountered"
    failed = report(2, STEP, "device", time=109.0, message=message)
    others = [report(rank, STEP + "E", time=100.0 + rank, **neighbour) for rank in (0, 1, 3)]
    verdict = judged(failed, *others)
    assert (verdict.kind, verdict.rank, verdict.node) == ("device", 2, "n1")
    assert verdict.text.endswith(message)


def test_a_rank_that_is_gone_comes_before_its_neighbours_abort() -> None:
    aborted = [report(rank, STEP + "E", "died", signal="SIGABRT", time=100.0 + rank) for rank in (0, 1, 2)]
    verdict = judged(*aborted, placed=NODES, absent={3: Absence.ENDED})
    assert (verdict.kind, verdict.rank, verdict.node) == ("gone", 3, "n1")


def test_an_abort_in_a_collective_blames_nobody() -> None:
    """So libraries end a process that has lost a peer, whoever that is."""
    aborted = report(0, STEP + "E", "died", signal="SIGABRT")
    verdict = judged(aborted, *(report(rank, STEP + "E", "waiting") for rank in (1, 2, 3)))
    assert (verdict.kind, verdict.rank, verdict.node) == ("died", None, None)
    assert "inside collective 11, all_reduce of (16, 16) float32 over tp [0, 1]" in verdict.text
    both = [report(rank, STEP, "died", signal="SIGABRT", inside=False) for rank in (1, 2)]
    assert judged(*both, *(report(rank, STEP + "E", "waiting") for rank in (0, 3))).rank is None


# ------------------------------------------------------------------------------------------------------- a rendezvous


def meeting(rank: int, kind: str = "infra", **more: Any) -> Report:
    """Of one of four ranks, on two nodes, that ended before all had met."""
    return report(rank, "", kind, phase="rendezvous", **more)


NO_DEVICE: dict[str, Any] = {"kind": "hang", "arrived": False, "silent": 306.0}  # hangs in an import or in the driver
OUTSIDE: dict[str, Any] = {"kind": "infra", "silent": 300.0}  # cannot reach rank 0
ABORTED: dict[str, Any] = {"kind": "died", "signal": "SIGABRT"}


@pytest.mark.parametrize(
    ("reports", "absent", "rank", "node", "kind"),
    [
        (
            [meeting(0), meeting(1), meeting(2, **NO_DEVICE), meeting(3, **NO_DEVICE | {"kind": "waiting"})],
            {},
            2,
            "n1",
            "hang",
        ),
        ([meeting(0), meeting(1), meeting(2, **OUTSIDE), meeting(3, **OUTSIDE)], {}, 2, "n1", "hang"),
        ([meeting(0), meeting(1)], {2: Absence.NEVER_CAME, 3: Absence.NEVER_CAME}, 2, "n1", "gone"),
        ([meeting(0, **NO_DEVICE), *(meeting(rank, **OUTSIDE) for rank in (1, 2, 3))], {}, 0, "n0", "hang"),
        # Before a neighbour's abort:
        ([meeting(0, **ABORTED), meeting(1)], {2: Absence.NEVER_CAME, 3: Absence.NEVER_CAME}, 2, "n1", "gone"),
        ([meeting(0, **ABORTED), meeting(1), meeting(2, **OUTSIDE), meeting(3, **OUTSIDE)], {}, 2, "n1", "hang"),
        # No evidence, or equal:
        ([meeting(0), meeting(2)], {1: Absence.NEVER_CAME, 3: Absence.NEVER_CAME}, None, None, "infra"),
        ([meeting(0), meeting(2), meeting(1, **OUTSIDE), meeting(3, **OUTSIDE)], {}, None, None, "infra"),
        ([meeting(rank, **NO_DEVICE) for rank in range(4)], {}, None, None, "hang"),
        ([meeting(rank, "hang", silent=306.0) for rank in range(4)], {}, None, None, "hang"),  # in the groups' making
        ([meeting(r, lasted=5.0) for r in (0, 1)], dict.fromkeys((2, 3), Absence.NEVER_CAME), None, None, "infra"),
        ([meeting(rank) for rank in range(4)], {}, None, None, "infra"),
    ],
)
def test_the_node_that_a_rendezvous_waits_for(
    reports: list[Report], absent: dict[int, Absence], rank: int | None, node: str | None, kind: str
) -> None:
    verdict = judged(*reports, placed=NODES, absent=absent)
    assert (verdict.rank, verdict.node, verdict.kind) == (rank, node, kind), verdict.text
    if node == "n1":
        assert "kept the others waiting in the rendezvous, and so did rank 3" in verdict.text


# ---------------------------------------------------------------------------------------------------------------- hangs


def test_where_all_wait_in_one_collective_no_rank_failed() -> None:
    verdict = judged(*(report(rank, STEP + "E", world=2) for rank in (0, 1)))
    assert verdict.kind == "hang"
    assert "collective 11" in verdict.text
    assert "the network" in verdict.text


def test_a_hang_before_any_collective() -> None:
    verdict = judged(*(report(rank, "", message="silent for 9 s in the phase `build`", world=2) for rank in (0, 1)))
    assert verdict.kind == "hang"
    assert "silent for 9 s in the phase `build`" in verdict.text
    assert (verdict.rank, verdict.node) == (None, None)


# --------------------------------------------------------------------------------------------- a grid of 2 by 4 ranks


def grid(calls: dict[int, str], outside: int | None = None) -> list[Report]:
    """Reports of 8 ranks, dp=2 and tp=4, that all hang, but for one in a collective."""
    return [report(rank, calls[rank], tp=4, world=8, inside=rank != outside) for rank in calls]


@pytest.mark.parametrize("rank", [0, 5, 7])
def test_a_rank_that_blocks_its_tp_group_and_so_the_dp_peers(rank: int) -> None:
    group, peers = sorted([list(range(4)), list(range(4, 8))], key=lambda ranks: rank not in ranks)
    calls = dict.fromkeys(peers, STEP + "EAFAFLBBBG") | dict.fromkeys(group, STEP + "EA") | {rank: STEP + "E"}
    verdict = judged(*grid(calls, outside=rank))
    assert (verdict.kind, verdict.rank, verdict.node, verdict.step) == ("hang", rank, f"n{rank // 4}", 1)
    assert f"never entered collective 12, all_reduce of (16, 16) float32 over tp {group}" in verdict.text
    assert "row_parallel < model.py:67" in verdict.text


@pytest.mark.parametrize("rank", [1, 6])
def test_a_rank_that_blocks_its_dp_group_and_so_both_tp_groups(rank: int) -> None:
    """Its dp peer waits for it; the other pairs are through, and wait for these two in the norm."""
    reduced, pair = STEP + "EAFAFLBBBG", sorted([rank, (rank + 4) % 8])
    calls = dict.fromkeys(range(8), reduced + "N") | dict.fromkeys(pair, reduced) | {rank: reduced[:-1]}
    verdict = judged(*grid(calls, outside=rank))
    assert (verdict.kind, verdict.rank) == ("hang", rank)
    assert f"never entered collective 2, all_reduce of (4096,) float32 over dp {pair}" in verdict.text


def test_a_killed_rank_of_the_grid_names_what_it_was_in() -> None:
    reports = grid(dict.fromkeys(range(8), STEP + "EA"))
    reports[6]["cause"] = {"kind": "died", "message": "killed by SIGKILL", "signal": "SIGKILL"}
    verdict = judged(*reports)
    assert (verdict.kind, verdict.rank) == ("died", 6)
    assert "inside collective 12, all_reduce of (16, 16) float32 over tp [4, 5, 6, 7]" in verdict.text


@pytest.mark.parametrize(
    ("world", "members", "waited"),
    [
        (8, "0, 1, 2, 3, 4, 5, 6, 7", "ranks 0, 1, 2, 3, 4, 6, 7"),
        (64, "0, 1, 2, ..., 63", "ranks 0, 1, 2, ..., 63"),
    ],
)
def test_a_text_is_as_short_for_many_ranks(world: int, members: str, waited: str) -> None:
    """Whether or not a record describes the collective."""
    reports = [report(rank, STEP + "E" * (rank != 5), tp=world, world=world, inside=rank != 5) for rank in range(world)]
    assert f"over tp [{members}] (layers.py" in judged(*reports).text
    assert judged(*reports).text.endswith(f"while {waited} waited")
    for each in reports:
        each["collectives"] = []
    assert f"collective 11 over tp [{members}], while {waited} waited" in judged(*reports).text


# ---------------------------------------------------------------------------------------------------------- mismatches


def test_the_one_that_differs_from_the_majority() -> None:
    calls = dict.fromkeys(range(8), STEP + "EAFAFL") | {5: STEP + "EAFAFs"}
    verdict = judged(*grid(calls))
    assert (verdict.kind, verdict.rank) == ("mismatch", 5)
    assert "entered collective 16, all_gather of (1, 2, 15) float32 over tp [4, 5, 6, 7]" in verdict.text
    assert "where rank 4 entered collective 16, all_gather of (1, 2, 16) float32 over tp [4, 5, 6, 7]" in verdict.text


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("EAFAFL", "EAFAFs"),  # another shape
        ("EAFAFL", "EAFAFB"),  # skips the loss's; the other stands in it
        ("EAFAF", "EFAFL"),  # skips the first attention's, which pairs with later ones of its size
        ("EAFAFLBBB", "EAFAFLBBN"),  # skips one of several that look alike
    ],
)
def test_of_two_it_is_the_one_that_leaves_the_course_of_earlier_steps(right: str, wrong: str, rank: int) -> None:
    calls = {rank: 2 * STEP + wrong, 1 - rank: 2 * STEP + right}
    verdict = judged(*(report(r, calls[r], world=2) for r in (0, 1)))
    assert (verdict.kind, verdict.rank) == ("mismatch", rank), verdict.text


@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_in_a_first_step_it_is_the_one_whose_call_the_other_does_next(rank: int) -> None:
    calls = {rank: "EAFAFBB", 1 - rank: "EAFAFLB"}
    verdict = judged(*(report(r, calls[r], world=2) for r in (0, 1)))
    assert (verdict.kind, verdict.rank) == ("mismatch", rank), verdict.text
    assert "skipped collective 6, all_gather of (1, 2, 16) float32 over tp [0, 1]" in verdict.text


def test_a_mismatch_explains_a_crash() -> None:
    """Over gloo a rank that gets another size than it awaits may abort."""
    calls = dict.fromkeys(range(4), STEP + "EAFAFL") | {2: STEP + "EAFAFs"}
    kinds = {0: "infra", 1: "infra", 2: "infra", 3: "died"}
    verdict = judged(*(report(r, calls[r], kinds[r], signal="SIGABRT") for r in range(4)))
    assert (verdict.kind, verdict.rank) == ("mismatch", 2)


def test_where_nothing_tells_two_apart_neither_is_to_blame() -> None:
    verdict = judged(report(0, "E", world=2), report(1, "B", world=2))
    assert (verdict.kind, verdict.rank, verdict.node) == ("mismatch", None, None)
    assert "rank 0 entered collective 1" in verdict.text
    assert "where rank 1 entered collective 1" in verdict.text


# -------------------------------------------------------------------------- ranks whose programs differ: pp=2 and tp=2


def stages(calls: dict[int, str], outside: tuple[int, ...] = ()) -> list[Report]:
    """Reports of ranks 0 and 1, the first stage, and 2 and 3, the second; `P` is a transfer from 0 to 2 or 1 to 3."""
    reports = []
    for rank, text in calls.items():
        groups = {"tp": [rank // 2 * 2, rank // 2 * 2 + 1], "pp": [rank % 2, rank % 2 + 2], "dp": [0, 1]}
        letters = [(letter, groups[CALLS[letter[0]][2]]) for letter in re.findall(r"\w\*?", text)]
        reports.append(report_of(rank, letters, "hang", rank not in outside, len(calls), 2))
    return reports


def test_a_rank_that_hangs_in_the_second_stage() -> None:
    """The first has entered many more collectives over tp, and waits for the second."""
    first = 3 * "EAFAFP"
    verdict = judged(*stages({0: first, 1: first, 2: "PALPA", 3: "PALP"}, outside=(3,)))
    assert (verdict.kind, verdict.rank, verdict.node) == ("hang", 3, "n1")
    assert "never entered collective 3, all_reduce of (16, 16) float32 over tp [2, 3]" in verdict.text
    assert verdict.text.endswith("while ranks 0, 1, 2 waited")


def test_a_rank_that_died_is_followed_through_another_group() -> None:
    """Rank 0 waits over tp for rank 1, which waits over pp for the dead one."""
    reports = stages({0: "EAFPE", 1: "EAFP", 2: "PA", 3: ""})
    reports[3]["cause"] = {"kind": "died", "message": "killed by SIGKILL", "signal": "SIGKILL"}
    verdict = judged(*reports)
    assert (verdict.kind, verdict.rank, verdict.node) == ("died", 3, "n1")
    assert "never entered collective 1, all_reduce of (16, 16) float32 over tp [2, 3]" in verdict.text
    assert verdict.text.endswith("while ranks 0, 1, 2 waited")


def test_two_groups_in_opposite_order_are_a_cycle() -> None:
    verdict = judged(*stages({0: "E", 1: "G"}))
    assert (verdict.kind, verdict.rank, verdict.node) == ("hang", None, None)
    assert "rank 0 for rank 1 in collective 1, all_reduce of (16, 16) float32 over tp [0, 1]" in verdict.text
    assert "rank 1 for rank 0 in collective 1, all_reduce of (4096,) float32 over dp [0, 1]" in verdict.text


def test_a_cycle_of_four_over_four_groups() -> None:
    verdict = judged(*stages({0: "EPE", 1: "EPP", 2: "PP", 3: "PA"}))
    assert (verdict.kind, verdict.rank, verdict.node) == ("hang", None, None)
    waits = ["0 for rank 1 in collective 2", "1 for rank 3 in collective 2", "3 for rank 2 in collective 1"]
    assert all(f"rank {wait}" in verdict.text for wait in [*waits, "2 for rank 0 in collective 2"]), verdict.text


def test_a_skipped_collective_in_one_group_while_another_went_on() -> None:
    first = 4 * "EAFAFP"
    verdict = judged(*stages({0: first, 1: first, 2: "PALPAL", 3: "PALPAPA"}))
    assert (verdict.kind, verdict.rank, verdict.node) == ("mismatch", 3, "n1")
    assert "skipped collective 4, all_gather of (1, 2, 16) float32 over tp [2, 3]" in verdict.text
    assert "went on to collective 4, all_reduce of (16, 16) float32 over tp [2, 3]" in verdict.text


def test_what_runs_in_the_background_is_not_waited_for() -> None:
    """Rank 0 hangs outside any collective; the peer that it will need later waits for it already."""
    verdict = judged(*stages({0: "GG*", 1: "GE"}, outside=(0,)))
    assert (verdict.kind, verdict.rank, verdict.node) == ("hang", 0, "n0")
    assert "never entered collective 1, all_reduce of (16, 16) float32 over tp [0, 1]" in verdict.text


def test_of_two_that_are_waited_for_neither_is_to_blame_for_sure() -> None:
    verdict = judged(*stages({0: "EPE", 1: "EP", 2: "PA", 3: "P"}, outside=(1, 3)))
    assert (verdict.kind, verdict.rank, verdict.node) == ("hang", None, None)
    assert "no rank is to blame for sure: rank 1 never entered collective 2" in verdict.text
    assert "rank 3 never entered collective 1" in verdict.text


@pytest.mark.parametrize(
    ("first", "outside", "text"),
    [
        ("EPEP", (), "none came out: the network"),
        ("EPE", (0, 2), "rank 3 did not come out: the network or a rank itself"),
    ],
)
def test_a_collective_that_all_members_entered_holds_up_the_other_stage(
    first: str, outside: tuple[int, ...], text: str
) -> None:
    verdict = judged(*stages({0: first, 1: "EPEP", 2: "PA", 3: "PA"}, outside))
    assert (verdict.kind, verdict.rank, verdict.node) == ("hang", None, None), verdict.text
    assert "ranks 2, 3 entered collective 1, all_reduce of (16, 16) float32 over tp [2, 3]" in verdict.text
    assert text in verdict.text


# ------------------------------------------------------------------------------------------------------- the black box


def filled(count: int, inside: bool = False, ranks: range = range(1, 8, 2)) -> BlackBox:
    box = BlackBox()
    for number in range(1, count + 1):
        entered = box.enter("all_reduce", (number % 7,), "float32", "dp", ranks)
        if number < count or not inside:
            box.leave(entered)
    return box


def test_the_ring_keeps_the_last_collectives() -> None:
    kept = filled(5000, inside=True).collectives()
    assert SLOTS - 2 <= len(kept) <= SLOTS
    assert [call["number"] for call in kept] == list(range(5001 - len(kept), 5001))
    assert all(call["shape"] == f"({call['number'] % 7},)" and call["ranks"] == "1:8:2" for call in kept)
    assert [call["left"] for call in kept] == [True] * (len(kept) - 1) + [False]


def test_a_hang_is_found_after_the_ring_has_wrapped() -> None:
    reports = []
    for rank, (count, inside) in enumerate([(5000, True), (4999, False)]):
        box = filled(count, inside, range(2))
        noted = {"entered": count, "groups": box.group_counts(), "collectives": box.collectives()}
        reports.append({**report(rank, world=2), **noted})
    verdict = judged(*reports)
    assert (verdict.kind, verdict.rank) == ("hang", 1)
    assert "never entered collective 5000, all_reduce of (2,) float32 over dp" in verdict.text


def test_a_long_shape_leaves_the_other_entries_whole() -> None:
    box = filled(3)
    box.enter("all_reduce", tuple(range(1000)), "float32", "tp", range(2))
    box.enter("barrier", (), "object", "control", range(2))
    assert [call["number"] for call in box.collectives()] == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("ranks", "text"), [((5,), "5:6:1"), ((1, 9, 17), "1:18:8"), (range(1024), "0:1024:1"), ((0, 1, 4, 5), "0,1,4,5")]
)
def test_ranks_at_even_distances_are_written_by_their_ends(ranks: Sequence[int], text: str) -> None:
    assert text_of(ranks) == text
    assert ranks_of(text) == tuple(ranks)


def test_collectives_are_numbered_within_their_group() -> None:
    box = BlackBox()
    for axis, ranks in [("tp", (0, 1)), ("model", (0, 1, 4, 5)), ("tp", (0, 1)), ("model", (0, 1)), ("tp", (0, 1))]:
        number = box.enter("barrier", (), "object", axis, ranks)
    box.run_on(number)
    noted = [(call["axis"], call["ranks"], call["number_in_group"]) for call in box.collectives()]
    assert noted == [
        ("tp", "0:2:1", 1),
        ("model", "0,1,4,5", 1),
        ("tp", "0:2:1", 2),
        ("model", "0:2:1", 1),
        ("tp", "0:2:1", 3),
    ]
    assert [count["entered"] for count in box.group_counts()] == [3, 1, 1]
    assert [call["background"] for call in box.collectives()] == [False] * 4 + [True]


def test_the_count_of_a_group_outlives_its_records() -> None:
    box = BlackBox()
    for _ in range(3):
        box.leave(box.enter("barrier", (), "object", "control", range(4)))
    for _ in range(SLOTS):
        box.leave(box.enter("barrier", (), "object", "tp", range(2)))
    assert {call["axis"] for call in box.collectives()} == {"tp"}
    assert box.group_counts() == [
        {"axis": "control", "ranks": "0:4:1", "entered": 3},
        {"axis": "tp", "ranks": "0:2:1", "entered": SLOTS},
    ]


def test_a_trainer_killed_between_record_and_count_has_entered() -> None:
    box = filled(5, inside=True)
    box.table[0].entered = 4
    assert [count["entered"] for count in box.group_counts()] == [5]


def test_a_collective_in_the_background_is_noted_as_such_until_it_is_waited_for() -> None:
    box, states = BlackBox(), []

    def note() -> None:
        states.append((box.collectives()[-1]["background"], box.collectives()[-1]["left"]))

    class Noting(Nobody):
        def all_reduce_(self, x: torch.Tensor, op: Op) -> Finish:
            return note

    pending = all_reduce_(torch.zeros(1), Group("tp", (0, 1), Noting(), box))
    note()
    pending.wait()
    note()
    assert states == [(True, False), (False, False), (False, True)]


def validated(rank: int) -> list[str]:
    """What a rank of a 2 by 2 grid notes in a validation over 5 sequences: 3 for one dp rank and 2 for the other."""
    box, row = BlackBox(), rank // 2 * 2
    groups = {axis: Group(axis, ranks, Nobody(), box) for axis, ranks in (("tp", (row, row + 1)), ("dp", (0, 2)))}
    grid = Mesh(tp_grid(4, 2, 2), rank, torch.device("cpu"), groups, box=box)
    config = Config(model=ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))
    config.train.eval_sequences, config.train.micro_batch_size, config.train.seq_len = 5, 2, 8
    tiny = training(config.model, grid)
    held_out = MagicMock(sequence=lambda index: np.arange(9) + index, __len__=lambda self: 5)
    trainer = Trainer(config, grid, Mock(validation=held_out), tiny.model, tiny.optimizer, tiny.loss)
    trainer.validation_loss()
    return [f"{call['op']} {call['shape']} {call['axis']} {call['site']}" for call in box.collectives()]


def test_all_ranks_note_the_same_collectives_in_the_same_order() -> None:
    """What every found rests on within a group, and what a validation that does not divide by dp would break."""
    assert len(validated(0)) > 5
    assert validated(2) == validated(0)


# ------------------------------------------------------------------------------------------- what a judge needs of many


def needed(*reports: Report) -> list[list[int]]:
    """Of each rank, the numbers of the collectives that come out of `unpack`."""
    unpacked = unpack({r["rank"]: json.loads(json.dumps(pack(r))) for r in reports})
    return [[call["number"] for call in each["collectives"]] for each in unpacked.values()]


def test_of_a_common_course_a_judge_needs_the_end() -> None:
    calls = "EA" * 10
    assert needed(*(report(rank, calls, world=2) for rank in (0, 1))) == [[18, 19, 20]] * 2
    assert needed(report(0, calls, world=2), report(1, calls[:15], world=2)) == [list(range(13, 21)), [13, 14, 15]]


def test_a_judge_needs_all_from_one_that_has_not_returned() -> None:
    running = report(0, "EA" * 10, world=2)
    running["collectives"][6] |= {"left": False, "background": True}
    assert needed(running, report(1, "EA" * 10, world=2)) == [list(range(7, 21)), [18, 19, 20]]


def test_a_judge_needs_all_where_the_courses_differ() -> None:
    everything = list(range(1, 21))
    assert needed(report(0, "E" * 20, world=2), report(1, "A" * 20, world=2)) == [everything] * 2
    assert needed(report(0, "EA" * 10, world=2), report(1, "EEA" + "EA" * 8 + "E", world=2)) == [everything] * 2


def test_a_judge_needs_all_where_a_record_is_missing() -> None:
    """What is left of the first rank's reads like the second's, one place off."""
    reports = report(0, "EEEAB" + "E" * 15, world=2), report(1, "EEAB" + "E" * 16, world=2)
    del reports[0]["collectives"][1]
    assert needed(*reports) == [[1, *range(3, 21)], list(range(1, 21))]


# ------------------------------------------------------------------------------------------------------------- reading


def test_reports_that_are_old_or_half_written_are_left_out(tmp_path: Path) -> None:
    for rank, at in ((0, 100.0), (1, 50.0)):
        (tmp_path / f"rank-{rank:05d}.json").write_text(json.dumps(report(rank, time=at)))
    (tmp_path / "rank-00002.json").write_text('{"rank": 2, "ti')
    (tmp_path / "rank-00003.stacks").write_text("")
    assert read(tmp_path, since=60.0).keys() == {0}
    assert read(tmp_path).keys() == {0, 1}


def test_nodes_of_an_attempt(tmp_path: Path) -> None:
    assert nodes(tmp_path, "7.0-1") == []
    (tmp_path / "logs").mkdir()
    starts = [{"event": "start", "attempt": f"7.0-{restart}", "nodes": [f"n{restart}"]} for restart in (0, 1)]
    lines = [json.dumps(start) for start in starts]
    (tmp_path / "logs" / "attempts.jsonl").write_text("\n".join([*lines, '{"event": "st']))
    assert nodes(tmp_path, "7.0-1") == ["n1"]


def test_a_report_that_comes_by_file_is_compared_with_the_whole_of_the_others() -> None:
    """Rank 1 cannot be reached and has left its file; rank 0 has left out a collective five before its last."""
    step = "EAFLBBBBBN"
    reports = {0: report(0, step + "EAFBBBBBN", tp=2, world=2), 1: report(1, step + "EAFLBBBBB", tp=2, world=2)}
    supervisor = Mock(_read=lambda: reports)
    Supervisor._judge_packed(supervisor, {0: pack(reports[0])}, {1: Absence.CUT_OFF}, {})
    (seen, absent, _), _ = supervisor._judge.call_args
    assert absent == {}
    assert judge(seen, 2, []).text == judge(reports, 2, []).text
    assert "collective 14, all_gather of (1, 2, 16) float32" in judge(seen, 2, []).text
