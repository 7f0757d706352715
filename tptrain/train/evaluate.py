"""Perplexity over all of a data set, in windows."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from tptrain.config import Config
from tptrain.config.schema import MOST_AT_ONCE
from tptrain.data.packing import packed_tokens, prepare
from tptrain.nn.cross_entropy import CrossEntropy
from tptrain.parallel.collectives import all_reduce_

if TYPE_CHECKING:
    from tptrain.train.trainer import Model


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats a token
    tokens: int  # that were scored

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(config: Config, model: "Model", loss: CrossEntropy) -> Evaluation:
    """Every token of the data but each window's first is scored once; the last window may be shorter.

    Every rank calls it and gets the same; the windows are divided over dp. Raises UserError for data that cannot be
    read.
    """
    mesh, length, size = model.mesh, config.train.seq_len, config.train.micro_batch_size or MOST_AT_ONCE
    data = replace(config.data, validation_fraction=0.0)
    folder = mesh.control.main_first(lambda: prepare(data, lambda _: None, mesh.box.touch))
    tokens = packed_tokens(folder)
    windows = -(-len(tokens) // length)
    turns = -(-windows // (size * mesh.size("dp")))  # as many on every rank
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # nats, tokens
    with tqdm(desc="evaluating", total=turns, unit=" batches", disable=mesh.disable_bar) as bar:
        for turn in range(turns):
            first = (turn * mesh.size("dp") + mesh.index("dp")) * size
            ids, scored = _windows(tokens, first, size, length)
            inputs, targets = ids[:, :-1].to(mesh.device), ids[:, 1:].flatten().to(mesh.device)
            losses = loss.losses(model(inputs), targets).view(size, length)
            total[0] += losses[scored].double().sum()
            total[1] += scored.sum()
            mesh.box.touch()
            bar.update()
    all_reduce_(total, mesh.group("dp")).wait()
    return Evaluation((total[0] / total[1]).item(), int(total[1].item()))


def _windows(tokens: np.ndarray, first: int, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows from the `first` on: ids (count, length + 1), and which targets are scored (count, length).

    A window's targets are its own tokens after the first. What is missing at the end of the data is filled with zeros.
    """
    ids = np.zeros((count, length + 1), dtype=np.int64)
    scored = np.zeros((count, length), dtype=bool)
    for row in range(count):
        part = tokens[(first + row) * length : (first + row + 1) * length]
        ids[row, : len(part)] = part
        scored[row, : max(0, len(part) - 1)] = True
    return torch.from_numpy(ids), torch.from_numpy(scored)
