"""How likely a model finds texts: the log-likelihood of continuations, each given its context, as token ids.

Shapes: B rows of a batch, G different contexts of it, T tokens, D hidden; N tokens of its continuations.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from tptrain.generate.cache import Cache
from tptrain.models.spec import DynamicScaling, LongScaling
from tptrain.nn.attention import Attention
from tptrain.nn.cross_entropy import CrossEntropy
from tptrain.nn.decoder import Decoder

if TYPE_CHECKING:
    from tptrain.generate.decode import Model

Request = tuple[list[int], list[int]]  # a context and a continuation of it, each of one token or more
WORTHWHILE = 0.1  # of a batch's tokens, which a cache spares: with less, attention without a mask is faster


@dataclass(frozen=True)
class Score:
    log_likelihood: float  # of the continuation, in nats
    greedy: bool  # whether each of its tokens is the likeliest


@dataclass(frozen=True)
class _Shared:
    """Requests that have the same context, by their numbers."""

    context: list[int]
    numbers: list[int]


@torch.no_grad()
def scores(
    model: "Model", loss: CrossEntropy, requests: Sequence[Request], batch_size: int
) -> Iterator[tuple[int, Score]]:
    """The number of each request and its score, those of this dp rank, the longest first, so that memory that does not
    suffice is seen at once.

    Every rank calls it with the same. A context and its continuation without the last token have at most as many tokens
    as the model has positions.
    """
    mesh = model.mesh
    batches = _batches(requests, batch_size, _unscaled(model))[mesh.index("dp") :: mesh.size("dp")]
    total = sum(len(shared.numbers) for batch in batches for shared in batch)
    with tqdm(desc="scoring", total=total, unit=" texts", disable=mesh.disable_bar) as bar:
        for batch in batches:
            numbers = [number for shared in batch for number in shared.numbers]
            continuations = [requests[number][1] for number in numbers]
            targets = torch.tensor([token for each in continuations for token in each], device=mesh.device)  # (N,)
            losses, greedy = loss.scores(_head_input(model, batch, continuations), targets)
            lengths = [len(each) for each in continuations]
            parts = zip(losses.double().cpu().split(lengths), greedy.cpu().split(lengths), strict=True)
            for number, (own, likeliest) in zip(numbers, parts, strict=True):
                yield number, Score(-own.sum().item(), bool(likeliest.all()))
            mesh.box.touch()
            bar.update(len(numbers))


def _batches(requests: Sequence[Request], batch_size: int, alone: float) -> list[list[_Shared]]:
    """Batches of up to `batch_size` requests, of like lengths, those of one context together; each request that has
    more than `alone` tokens is a batch of its own.
    """
    sizes = [len(context) + len(continuation) - 1 for context, continuation in requests]
    batches = [[_Shared(requests[number][0], [number])] for number, size in enumerate(sizes) if size > alone]
    batches.sort(key=lambda batch: -sizes[batch[0].numbers[0]])
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(requests):
        if sizes[number] <= alone:
            by_context.setdefault(tuple(context), []).append(number)
    parts = [
        _Shared(list(context), numbers[start : start + batch_size])
        for context, numbers in by_context.items()
        for start in range(0, len(numbers), batch_size)
    ]
    room = 0
    for shared in sorted(parts, key=lambda shared: -max(sizes[number] for number in shared.numbers)):
        if len(shared.numbers) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(shared)
        room -= len(shared.numbers)
    return batches


def _head_input(model: "Model", batch: list[_Shared], continuations: list[list[int]]) -> Tensor:
    """(N, D): what the head makes the logits of each token of the continuations of."""
    of = [place for place, shared in enumerate(batch) for _ in shared.numbers]  # the context of each row
    lengths = [len(shared.context) for shared in batch]
    spared = sum(lengths[place] for place in of) - sum(lengths)
    everything = sum(lengths[place] for place in of) + sum(map(len, continuations))
    if isinstance(model, Decoder) and spared > WORTHWHILE * everything and _unscaled(model) == math.inf:
        return _after_shared(model, [shared.context for shared in batch], of, continuations)
    return _whole(model, [batch[place].context for place in of], continuations)


def _unscaled(model: "Model") -> float:
    """The longest sequence in which keys are turned as in every shorter one, which a rotary scaling may limit."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    scalings = [layer.spec.rotary.scaling for layer in attentions if layer.spec.rotary is not None]
    return min((each.context for each in scalings if isinstance(each, DynamicScaling | LongScaling)), default=math.inf)


def _whole(model: "Model", contexts: list[list[int]], continuations: list[list[int]]) -> Tensor:
    """Without a cache. Rows are padded after their ends, which no token before sees."""
    rows = [context + each[:-1] for context, each in zip(contexts, continuations, strict=True)]
    tokens = _padded(rows, model.mesh.device)  # (B, T)
    x = model(tokens).view(*tokens.shape, -1)  # (B, T, D)
    return _picked(x, [len(context) - 1 for context in contexts], continuations)


def _after_shared(model: Decoder, contexts: list[list[int]], of: list[int], continuations: list[list[int]]) -> Tensor:
    """With the keys and values of each context computed once. `of`: the context of each row.

    Contexts are padded in front, so that all end in one column, and continuations after their ends.
    """
    device, width = model.mesh.device, max(map(len, contexts))
    longest = max(map(len, continuations)) - 1  # the last token of a continuation is no input
    padding = torch.tensor([width - len(context) for context in contexts])
    tokens = torch.tensor([[0] * (width - len(context)) + context for context in contexts], device=device)  # (G, T)
    cache = Cache(model, len(contexts), width + longest, padding.to(device) if padding.any() else None)
    rows = torch.tensor(of, device=device)
    x = cache.forward(tokens)[rows, -1:]  # (B, 1, D)
    if longest:
        cache.select(rows)
        further = cache.forward(_padded([each[:-1] for each in continuations], device))  # (B, longest, D)
        x = torch.cat([x, further], dim=1)
    return _picked(x, [0] * len(of), continuations)


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """(B, T), with zeros after a row's end."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def _picked(x: Tensor, first: list[int], continuations: list[list[int]]) -> Tensor:
    """(B, T, D) -> (N, D): of each row as many columns as its continuation has tokens, from column `first` on."""
    rows = [row for row, each in enumerate(continuations) for _ in each]
    columns = [first[row] + place for row, each in enumerate(continuations) for place in range(len(each))]
    return x[torch.tensor(rows, device=x.device), torch.tensor(columns, device=x.device)]
