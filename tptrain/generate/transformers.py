"""Continuations by a Transformers model's own `generate`: Transformers' code keeps the cache and counts positions, and
our sampler chooses each token.

A rank's layers have its own heads only. Transformers' caches take their sizes from the tensors that come, so they are
cut as the layers are. Shapes: B rows of a call, T tokens, D hidden, V vocabulary.
"""

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tptrain.config import UserError
from tptrain.generate.decode import Continuation, Finished
from tptrain.generate.sample import Sampler
from tptrain.hf.model import TransformersModel


def generate(
    model: TransformersModel,
    sampler: Sampler,
    batch: Sequence[tuple[int, list[int]]],
    max_new_tokens: int,
    finished: Finished,
) -> list[Continuation]:
    """See `decode`. Raises UserError for a model whose cache cannot be cut."""
    rows = [Continuation(number, ids) for number, ids in batch]
    with _inference(model):
        while alive := [row for row in rows if not row.end]:
            _Call(model, sampler, alive, max_new_tokens, finished).run()
    return rows


class _Call:
    """One call of Transformers' `generate`, which ends where a row has the model's last position: an embedding of
    positions has none beyond it, not even for a row that has ended. Shorter rows go on in the next call.
    """

    def __init__(
        self,
        model: TransformersModel,
        sampler: Sampler,
        rows: list[Continuation],
        max_new_tokens: int,
        finished: Finished,
    ) -> None:
        self.model, self.sampler, self.rows, self.finished = model, sampler, rows, finished
        self.limits = [min(max_new_tokens, model.max_positions - len(row.prompt)) for row in rows]
        padding = getattr(model.inner.config.get_text_config(), "pad_token_id", None)
        self.padding = padding if isinstance(padding, int) and 0 <= padding < model.vocab_size else 0

    def run(self) -> None:
        """Adds tokens to the rows."""
        device, sequences = self.model.mesh.device, [row.prompt + row.ids for row in self.rows]
        width = max(map(len, sequences))
        tokens = torch.tensor([[self.padding] * (width - len(ids)) + ids for ids in sequences], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)  # (B, T)
        missing = max(limit - len(row.ids) for limit, row in zip(self.limits, self.rows, strict=True))
        new = max(1, min(missing, self.model.max_positions - width))
        settings = {"do_sample": False, "use_cache": True, "pad_token_id": self.padding}
        self.model.inner.generate(
            tokens,
            attention_mask=mask,
            generation_config=GenerationConfig(max_new_tokens=new, **settings),
            logits_processor=[self._choose],
            stopping_criteria=[self._ended],
        )

    def _choose(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) in which one token of each row is possible. The model's own are not looked at: its head has
        returned its input, and each rank computes the logits of its columns from that.
        """
        alive = [place for place, row in enumerate(self.rows) if not row.end]
        kept = torch.tensor(alive, device=tokens.device)
        logits = self.model.logits(self.model.last_input()[kept])  # of rows that go on: (b, V/tp)
        keys = [(self.rows[place].number, len(self.rows[place].ids)) for place in alive]
        ids = torch.full((len(tokens),), self.padding, device=tokens.device)  # (B,)
        ids[kept] = self.sampler.choose(logits, keys)
        impossible = torch.full((len(tokens), self.model.vocab_size), -torch.inf, device=tokens.device)
        return impossible.scatter_(1, ids.unsqueeze(1), 0.0)

    def _ended(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        """Notes the tokens (B, T) that came last. Which rows need no more: (B,)."""
        for row, limit, token in zip(self.rows, self.limits, tokens[:, -1].tolist(), strict=True):
            if not row.end:
                row.ids.append(token)
                row.end = "stop" if self.finished(row) else "length" if len(row.ids) >= limit else ""
        self.model.mesh.box.touch()
        return torch.tensor([bool(row.end) for row in self.rows], device=tokens.device)


@contextmanager
def _inference(model: TransformersModel) -> Iterator[None]:
    """The model without dropout, and without settings of its own for `generate`; in the end as it was.

    Raises UserError where shapes within Transformers' code do not fit.
    """
    inner: Any = model.inner
    training, settings = inner.training, inner.generation_config
    inner.eval()
    inner.generation_config = GenerationConfig()
    try:
        yield
    except (RuntimeError, IndexError) as error:
        text, tp = (str(error).splitlines() or [""])[0], model.mesh.size("tp")
        calls = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        ours = not calls.isdisjoint((_Call._choose.__name__, _Call._ended.__name__))
        if tp == 1 or ours or not re.search("size|shape|dimension|index", text):
            raise
        name = type(inner).__name__
        raise UserError(
            f"generate: the cache of {name} cannot be cut by parallel.tp={tp} ({text}). Use parallel.tp=1."
        ) from error
    finally:
        inner.train(training)
        inner.generation_config = settings
        model.lm_head.input = None
