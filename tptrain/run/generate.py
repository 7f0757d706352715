"""One rank of `generate` as a process. Nobody supervises it, and it writes nothing."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tptrain.config import Config
from tptrain.config.generation import prompts
from tptrain.config.schema import GenerateConfig
from tptrain.generate.answers import Answer, answers, prompt_ids
from tptrain.generate.text import of_config
from tptrain.models.sizes import sizes
from tptrain.ops.compiled import eager
from tptrain.run.rendezvous import connect_ranks, meet
from tptrain.run.weights import model_with_weights
from tptrain.watch.black_box import BlackBox

BATCHES = 16  # of each dp rank, of prompts of like lengths, before their answers are shown in the prompts' order


def run(
    config: Config,
    checkpoint: Path | None,
    folder: Path | None,
    settings: GenerateConfig,
    show: Callable[[str], None] | None,
) -> Iterator[tuple[dict[str, Any], Answer]]:
    """Answer prompts as one rank, whose place the environment tells: on rank 0, each prompt's row and its answer.

    `folder`: of the model's files beside its weights. `show`: gets a lone prompt's answer piece by piece.
    Raises UserError, CheckpointError and RendezvousError.
    """
    box, rows, ids = BlackBox(), list[dict[str, Any]](), list[list[int]]()
    rendezvous, text = meet(config, box), of_config(config, folder)

    def read() -> None:
        rows.extend(prompts(settings, sys.stdin))
        ids.extend(prompt_ids(rows, settings, text, sizes(config.model).max_positions))

    rendezvous.meeting.on_main("prompts", read)
    mesh = connect_ranks(config, box, rendezvous)
    everything = mesh.control.main_first(lambda: ids)
    model = model_with_weights(config, checkpoint, mesh, eager(rendezvous.ops))
    step = BATCHES * settings.batch_size * mesh.size("dp")
    for start in range(0, len(everything), step):
        part = everything[start : start + step]
        own = dict(answers(model, text, part, settings, show if mesh.is_main else None, start))
        parts = mesh.control.gather(own if mesh.index("tp") == 0 else {})
        if mesh.is_main:
            together = {number: answer for part in parts for number, answer in part.items()}
            yield from ((rows[number], together[number]) for number in sorted(together))
    dist.destroy_process_group()
