"""What a model goes on with after prompts, as token ids, in batches over the ranks of the dp axis."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tptrain.generate.codec import Codec
from tptrain.generate.decode import Continuation, decode_all
from tptrain.generate.sample import Sampler, Sampling

if TYPE_CHECKING:
    from tptrain.generate.decode import Model


@dataclass(frozen=True)
class Continue:
    """Prompts, which are (number, ids), and how to go on."""

    prompts: list[tuple[int, list[int]]]
    sampling: Sampling
    until: list[str]  # texts that end a continuation
    max_new_tokens: int


def continuations(model: "Model", codec: Codec, task: Continue, batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """The number of each prompt and its continuation without the id that ends it, those of this dp rank, the longest
    prompts first. Text beyond the first of `until` may follow it.

    Every rank calls it with the same.
    """
    sampler = Sampler(model.output_head, model.mesh, task.sampling)
    # A token has a byte or more: these are enough for each text to be seen as soon as it is whole.
    window = 2 + max((len(text.encode()) for text in task.until), default=0)

    def has(ids: list[int]) -> bool:
        text = codec.decode(ids, special=True)
        return any(end in text for end in task.until)

    def finished(row: Continuation) -> bool:
        if row.ids[-1] in codec.ends:
            return True
        # Out of its place a text may be decoded in another way: the whole decides.
        return bool(task.until) and has(row.ids[-window:]) and has(row.ids)

    for row in decode_all(model, sampler, task.prompts, batch_size, task.max_new_tokens, finished):
        ends = row.end == "stop" and row.ids[-1] in codec.ends
        yield row.number, row.ids[:-1] if ends else row.ids
