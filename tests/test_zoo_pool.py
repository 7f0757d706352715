"""Ranks that stay: a task that crashes or hangs fails alone, and the next one has ranks again."""

import os

import pytest
import torch.distributed as dist

from tests.zoo_pool import Pool, TaskError


def test_a_crash_ends_its_task_only() -> None:
    pool = Pool(2)
    try:
        assert pool.run(dist.get_rank) == [0, 1]
        with pytest.raises(TaskError, match="exit code 3"):
            pool.run(_die_on_rank_1)
        with pytest.raises(TaskError, match="ValueError: no such model"):
            pool.run(_raise_on_rank_1)
        with pytest.raises(TaskError, match="no answer in 1 s"):
            pool.run(_hang, timeout=1)
        assert pool.run(dist.get_rank) == [0, 1]
    finally:
        pool.stop()


def _die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def _raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such model")
    dist.barrier()


def _hang() -> None:
    while True:
        dist.barrier()
