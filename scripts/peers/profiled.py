"""How much of some work is spent in gloo's collectives."""

import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def collective_share(work: Callable[[], object]) -> float:
    """The part of the time of `work` in which at least one gloo collective is under way, waiting for peers included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.name.startswith("gloo:")
    )
    busy = reached = 0.0  # in microseconds; overlapping collectives count once
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6 / seconds
