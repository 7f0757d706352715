"""From prompts to continuations, as token ids: prompts in batches, a token of every row at a time.

Shapes: B rows of a batch, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from tptrain.generate.cache import Cache
from tptrain.generate.sample import Sampler
from tptrain.nn.decoder import Decoder

if TYPE_CHECKING:  # Transformers is imported where its models are in use
    from tptrain.hf.model import TransformersModel

    Model = Decoder | TransformersModel


@dataclass
class Continuation:
    """What the model adds to a prompt."""

    number: int  # of the prompt
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    end: str = ""  # why it ends: stop or length; empty while it goes on


Finished = Callable[[Continuation], bool]  # whether the text is to end here; called after each token


def decode_all(
    model: "Model",
    sampler: Sampler,
    prompts: Sequence[tuple[int, list[int]]],
    batch_size: int,
    max_new_tokens: int,
    finished: Finished,
    bar: bool = True,
) -> Iterator[Continuation]:
    """The continuations of those prompts that are this dp rank's, a batch at a time, the longest prompts first.

    Every rank calls it with the same. `bar`: whether a terminal shows how many there are.
    """
    mesh = model.mesh
    order = sorted(prompts, key=lambda prompt: (-len(prompt[1]), prompt[0]))
    own = order[mesh.index("dp") :: mesh.size("dp")]
    disable = mesh.disable_bar if bar else True
    with tqdm(desc="generating", total=len(own), unit=" prompts", disable=disable) as progress:
        for start in range(0, len(own), batch_size):
            batch = own[start : start + batch_size]
            yield from decode(model, sampler, batch, max_new_tokens, finished)
            progress.update(len(batch))


@torch.no_grad()
def decode(
    model: "Model",
    sampler: Sampler,
    batch: Sequence[tuple[int, list[int]]],
    max_new_tokens: int,
    finished: Finished,
) -> list[Continuation]:
    """The continuations of a batch of prompts, which are (number, ids); every rank of the tp axis calls it.

    A row ends where `finished` says so, after `max_new_tokens`, or where the model has no further position.
    """
    if not isinstance(model, Decoder):
        from tptrain.generate.transformers import generate

        return generate(model, sampler, batch, max_new_tokens, finished)
    rows = [Continuation(number, ids) for number, ids in batch]
    everything, device = list(rows), model.mesh.device
    width = max(len(row.prompt) for row in rows)
    limits = {row.number: min(max_new_tokens, model.spec.max_positions - len(row.prompt)) for row in rows}
    padding = torch.tensor([width - len(row.prompt) for row in rows])
    tokens = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=device)  # (B, T)
    columns = width + max(limits.values())
    cache = Cache(model, len(rows), columns, padding.to(device) if padding.any() else None)
    while rows:
        last = cache.forward(tokens)[:, -1]  # (B, D)
        keys = [(row.number, len(row.ids)) for row in rows]
        tokens = sampler.choose(model.logits(last), keys).unsqueeze(1)  # (B, 1)
        for row, token in zip(rows, tokens.flatten().tolist(), strict=True):
            row.ids.append(token)
            row.end = "stop" if finished(row) else "length" if len(row.ids) >= limits[row.number] else ""
        alive = [place for place, row in enumerate(rows) if not row.end]
        if len(alive) < len(rows):
            rows = [rows[place] for place in alive]
            kept = torch.tensor(alive, device=device, dtype=torch.int64)
            tokens = tokens[kept]
            if rows:
                cache.select(kept)
        model.mesh.box.touch()
    return everything
