"""Answers to prompts: texts in, texts out, in batches over the ranks of the dp axis."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tptrain.config.generation import check_prompt
from tptrain.config.schema import GenerateConfig
from tptrain.generate.decode import Continuation, decode_all
from tptrain.generate.sample import Sampler, Sampling
from tptrain.generate.text import Text

if TYPE_CHECKING:
    from tptrain.generate.decode import Model


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    end: str  # stop or length


class Writer:
    """The text of one answer while it grows, without what a stop text begins."""

    def __init__(self, text: Text, stop: list[str], show: Callable[[str], None] | None) -> None:
        self.piece, self.stop, self.show = text.pieces(), stop, show
        self.text, self.shown = "", 0

    def add(self, token: int) -> bool:
        """Whether a stop text has come."""
        piece = self.piece(token)
        start = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += piece
        places = [place for stop in self.stop if (place := self.text.find(stop, start)) >= 0]
        if places:
            self.text = self.text[: min(places)]
        self._show(len(self.text) if places else len(self.text) - self._held())
        return bool(places)

    def finish(self, text: str | None = None) -> str:
        """The whole answer; `text`: what all its ids are decoded to, where no stop text has ended it."""
        if text is not None:
            self.text = text
        self._show(len(self.text))
        return self.text

    def _held(self) -> int:
        """Characters at the end that may turn out to begin a stop text."""
        longest = max(map(len, self.stop), default=0)
        ends = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self.text[-n:]) for stop in self.stop)), 0)

    def _show(self, end: int) -> None:
        if self.show is not None and end > self.shown:
            self.show(self.text[self.shown : end])
            self.shown = end


def prompt_ids(rows: list[dict[str, Any]], settings: GenerateConfig, text: Text, positions: int) -> list[list[int]]:
    """The token ids of each prompt. Raises UserError for one that is empty or longer than the model's positions."""
    every = []
    for number, row in enumerate(rows, 1):
        which = f"prompt {number} of {len(rows)}" if len(rows) > 1 else "prompt"
        if "messages" in row or settings.chat:
            ids = text.chat(row.get("messages") or [{"role": "user", "content": row["prompt"]}])
        else:
            ids = text.encode(row["prompt"])
        check_prompt(which, len(ids), positions)
        every.append(ids)
    return every


def answers(
    model: "Model",
    text: Text,
    prompts: list[list[int]],
    settings: GenerateConfig,
    show: Callable[[str], None] | None = None,
    first: int = 0,
    bar: bool = True,
) -> Iterator[tuple[int, Answer]]:
    """The number of each prompt and its answer, those of this dp rank, a batch at a time, the longest prompts first.

    Every rank calls it with the same. `show` gets the text of a lone prompt's answer piece by piece; `first`: the
    number of the first prompt; `bar`: whether a terminal shows how many there are.
    """
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)
    sampler = Sampler(model.output_head, model.mesh, sampling)
    ends = text.ends | {i for stop in settings.stop if (i := text.id_of(stop)) is not None}
    writers = defaultdict[int, Writer](lambda: Writer(text, settings.stop, show if len(prompts) == 1 else None))

    def finished(row: Continuation) -> bool:
        return row.ids[-1] in ends or writers[row.number].add(row.ids[-1])

    bar = bar and show is None and len(prompts) > settings.batch_size * model.mesh.size("dp")
    rows = decode_all(
        model, sampler, list(enumerate(prompts, first)), settings.batch_size, settings.max_new_tokens, finished, bar
    )
    for row in rows:
        by_text = row.end == "stop" and row.ids[-1] not in ends
        answer = writers[row.number].finish(None if by_text else text.decode(_without(row.ids, ends)))
        yield row.number, Answer(answer, len(row.ids), row.end)


def _without(ids: list[int], ends: set[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in ends else ids
