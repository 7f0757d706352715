"""What a family's small model generates: in one process by Transformers, and in tptrain's hands on some ranks."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import transformers as hf
from torch import Tensor

from tests import reference as ref
from tests import zoo
from tests.distributed import mesh
from tests.engine import slice_of
from tptrain.config.schema import ModelConfig
from tptrain.generate import sample
from tptrain.generate.decode import decode
from tptrain.generate.sample import Sampler, Sampling
from tptrain.hf.model import TransformersModel, kv_heads
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE
from tptrain.parallel.mesh import Mesh

NEW = 12  # tokens
PROMPTS = {"equal": [11, 11], "unequal": [3, 14, 9, 1]}  # lengths
ALLOWED = 1e-3  # of the norm of a row's logits
NOISE = 0.3  # standard deviation of what is added to weights
# Its layers run many times over, so that with larger weights float32 and float64 differ by 1e-2 in one process.
LESS_NOISE = {"hrm_text": 0.1}


@dataclass
class Generated:
    """A model, and what one process generates by it, of each kind of prompts."""

    config: hf.PreTrainedConfig
    weights: dict[str, Tensor]  # parameters and saved buffers
    tokens: dict[str, list[list[int]]]  # (B, NEW)
    logits: dict[str, Tensor]  # that they are chosen by: (B, NEW, V)


def prompts(kind: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 256, (length,), generator=generator).tolist() for length in PROMPTS[kind]]


def generated(family: str, kinds: Iterable[str] = PROMPTS, **changes: Any) -> Generated:
    """By Transformers' `generate`, greedy, in batches that are padded on the left."""
    model, config = lively(family, **changes), zoo.config(family, **changes)
    config._attn_implementation = model.config._attn_implementation
    saved = model.state_dict()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights |= {name: b.detach() for name, b in model.named_buffers() if name in saved}
    result = Generated(config, weights, {}, {})
    padding = getattr(config.get_text_config(), "pad_token_id", None) or 0
    model.generation_config = hf.GenerationConfig()
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": padding}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    for kind in kinds:
        rows = prompts(kind)
        width = max(map(len, rows))
        tokens = torch.tensor([[padding] * (width - len(row)) + row for row in rows])  # (B, T)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])  # (B, T)
        answer = model.generate(tokens, attention_mask=mask, **settings)
        result.tokens[kind] = answer.sequences[:, width:].tolist()
        result.logits[kind] = torch.stack(answer.logits, 1)
    return result


def lively(family: str, **changes: Any) -> Any:
    """The family's small model, with weights so large that its tokens vary, and with its usual attention."""
    model: Any = zoo.model(family, **changes).eval()
    generator = torch.Generator().manual_seed(3)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) in tables:
                p.mul_(0.3)
            elif p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=generator) * LESS_NOISE.get(family, NOISE))
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    return model


def model_of(config: Any, weights: Mapping[str, Tensor], tp: int = 1) -> TransformersModel:
    """The sharded model of a config on this rank."""
    model = TransformersModel(config, mesh_of(tp, kv_heads(config)), ops=REFERENCE)
    Store(model, torch.float32).initialise(lambda name, p: slice_of(weights[name], p))
    model.settle()
    return model


@functools.cache
def mesh_of(tp: int, kv_heads: int) -> Mesh:
    """Groups stay for all cases of a rank."""
    return mesh(tp, kv_heads, shared=tp > 1)


def to_native(right: Generated) -> dict[str, Tensor]:
    """The weights by the names of our own decoder, for a family that it has."""
    case = ref.Case(right.config.model_type, ModelConfig(path="DIR", source=right.config.to_dict()))
    return ref.to_ours(case, right.weights)


class Noting(Sampler):
    """A sampler that keeps the logits which it is asked by."""

    def choose(self, logits: Tensor, keys: list[tuple[int, int]]) -> Tensor:
        self.noted = [*getattr(self, "noted", []), logits[:, : self.columns]]
        return super().choose(logits, keys)


def difference(right: Generated, tp: int, mutation: str = "") -> str:
    """What of this rank's greedy tokens, or of the logits that they are chosen by, is not that of one process; empty
    where nothing is. Logits are compared as long as the tokens before them are the same: where two are as likely as
    each other, either may come.
    """
    with MUTATIONS[mutation]() if mutation else nullcontext():
        model = model_of(right.config, right.weights, tp)
        before = _training(model)
        for kind in PROMPTS:
            sampler = Noting(model.output_head, model.mesh, Sampling())
            rows = decode(model, sampler, list(enumerate(prompts(kind))), NEW, lambda row: False)
            if wrong := _difference(sampler, [row.ids for row in rows], right.tokens[kind], right.logits[kind]):
                return f"{kind} prompts: {wrong}"
        if not torch.equal(_training(model), before):
            return "another forward pass after than before"
    return ""


def _training(model: TransformersModel) -> Tensor:
    """The head's input in a forward pass of training."""
    torch.manual_seed(2)  # of a router that draws experts
    return model(zoo.tokens())


def _difference(sampler: Noting, ours: list[list[int]], theirs: list[list[int]], logits: Tensor) -> str:
    """`logits`: theirs, (B, NEW, V)."""
    columns = slice(sampler.first, sampler.first + sampler.columns)
    far = (torch.stack(sampler.noted, 1) - logits[..., columns]).norm(dim=-1) / logits.norm(dim=-1)  # (B, NEW)
    for row, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        last = next((i for i in range(NEW) if own[i] != other[i]), NEW - 1)
        if not (distance := far[row, : last + 1].max().item()) < ALLOWED:
            return f"logits of row {row} {distance:.0e}"
        two = logits[row, last, [own[last], other[last]]]
        if not (two[0] - two[1]).abs() <= ALLOWED * logits[row, last].norm():
            return f"token {last} of row {row}"
    return ""


# ------------------------------------------------------------------------------------------------------------ mutations


def _see_the_padding() -> AbstractContextManager:
    right: Any = hf.GenerationMixin.__dict__["generate"]

    def generate(self: Any, tokens: Tensor, attention_mask: Tensor, **settings: Any) -> Any:
        return right(self, tokens, attention_mask=torch.ones_like(attention_mask), **settings)

    return patch.object(hf.GenerationMixin, "generate", generate)


def _heads_of_another_rank() -> AbstractContextManager:
    """Keys of the other KV head, of two, than the queries' own."""
    right = slice_of

    def swapped(whole: Tensor, p: Any) -> Tensor:
        kv = whole.shape == (zoo.KV_HEADS * 8, 64)
        return right(whole.roll(8, 0) if kv else whole, p)

    return patch(f"{__name__}.slice_of", swapped)


def _count_columns_anew_on_each_rank() -> AbstractContextManager:
    right = sample.largest
    return patch.object(sample, "largest", lambda scores, first, group: right(scores, 0, group))


def _leave_logits_unscaled() -> AbstractContextManager:
    return patch.object(TransformersModel, "last_input", lambda self: self.lm_head.input[:, -1])


MUTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "see the padding": _see_the_padding,
    "keys of another rank's heads": _heads_of_another_rank,
    "count columns anew on each rank": _count_columns_anew_on_each_rank,
    "leave logits unscaled": _leave_logits_unscaled,
}
