"""What a model goes on with after prompts, as token ids, in batches over the ranks of the dp axis."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from tptrain.generate.codec import Codec
from tptrain.generate.decode import Continuation, decode
from tptrain.generate.sample import Sampler, Sampling
from tptrain.nn.decoder import Decoder

if TYPE_CHECKING:  # Transformers is imported where its models are in use
    from tptrain.hf.model import TransformersModel

    Model = Decoder | TransformersModel


@dataclass(frozen=True)
class Continue:
    """Prompts, which are (number, ids), and how to go on."""

    prompts: list[tuple[int, list[int]]]
    sampling: Sampling
    until: list[str]  # texts that end a continuation
    max_new_tokens: int


def continuations(model: "Model", codec: Codec, task: Continue, batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """The place of each prompt in the list and its continuation without the id that ends it, those of this dp rank, the
    longest prompts first. Text beyond the first of `until` may follow it.

    Every rank calls it with the same.
    """
    mesh, prompts = model.mesh, task.prompts
    sampler = Sampler(model.output_head, mesh, task.sampling)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place][1]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = batches[mesh.index("dp") :: mesh.size("dp")]
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

    total = sum(map(len, own))
    with tqdm(desc="generating", total=total, unit=" prompts", disable=None if mesh.is_main else True) as bar:
        for batch in own:
            rows = [prompts[place] for place in batch]
            # decode keeps the order of its prompts
            for place, row in zip(batch, decode(model, sampler, rows, task.max_new_tokens, finished), strict=True):
                ends = row.end == "stop" and row.ids[-1] in codec.ends
                yield place, row.ids[:-1] if ends else row.ids
            bar.update(len(batch))
