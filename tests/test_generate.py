"""Greedy continuations against Transformers' `generate`, of every native family, at tp 1, 2 and 4."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference as ref
from tests.distributed import mesh, run_ranks
from tests.families import FAMILIES
from tptrain.generate.decode import decode
from tptrain.generate.sample import Sampler, Sampling
from tptrain.models.settings import decoder_spec
from tptrain.nn.decoder import Decoder
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE

NEW = 20  # tokens; with them most sequences are longer than the windows and the contexts of rotary scalings
PROMPTS = {"equal": [11, 11], "unequal": [3, 14, 9, 1]}  # lengths


def _prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, ref.VOCAB, (length,), generator=generator).tolist() for length in lengths]


def _theirs(model: Any, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """What Transformers adds, in one batch padded on the left."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=mask, **settings)[:, width:].tolist()


def _model(case: ref.Case, weights: dict[str, Tensor], tp: int) -> Decoder:
    spec = decoder_spec(case.ours)
    model = Decoder(spec, mesh(tp, spec.kv_heads, shared=tp > 1), REFERENCE)
    store = Store(model, torch.float32)

    def slice_of(name: str, p: Any) -> Tensor:
        place = zip(p.sharding.offsets, p.sharding.local_shape, strict=True)
        return weights[name][tuple(slice(start, start + length) for start, length in place)]

    store.initialise(slice_of)
    return model


def _ours(case: ref.Case, weights: dict[str, Tensor], prompts: list[list[int]], tp: int) -> list[list[int]]:
    model = _model(case, weights, tp)
    sampler = Sampler(model.output_head, model.mesh, Sampling())
    rows = decode(model, sampler, list(enumerate(prompts)), NEW, lambda row: False)
    return [row.ids for row in rows]


@pytest.fixture(scope="module")
def of_families() -> tuple[dict[Any, Any], list[Any]]:
    """Every family's continuations: Transformers' by (family, kind of prompts), ours on each rank by tp too."""
    tasks, right = {}, {}
    for family, case in FAMILIES.items():
        model = _hf_model(case)
        tasks[family] = case, ref.to_ours(case, dict(model.named_parameters()))
        for kind, lengths in PROMPTS.items():
            right[family, kind] = _theirs(model, _prompts(lengths))
    return right, run_ranks(4, _of_families, tasks)


def _hf_model(case: ref.Case) -> Any:
    torch.manual_seed(0)
    model = ref.hf_model(case).eval()
    with torch.no_grad():  # so large, and a token's own row so small, that it is not the same token over and over
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.03 if len(p) == ref.VOCAB else 0.3))
    return model


def _of_families(tasks: dict[str, tuple[ref.Case, dict[str, Tensor]]]) -> dict[tuple[str, str, int], list[list[int]]]:
    return {
        (family, kind, tp): _ours(case, weights, _prompts(lengths), tp)
        for family, (case, weights) in tasks.items()
        for kind, lengths in PROMPTS.items()
        for tp in (1, 2, 4)
    }


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, kind: str, of_families: Any) -> None:
    right, everywhere = of_families
    assert len({token for row in right[family, kind] for token in row}) > 9, "a test of nothing"
    for rank in everywhere:
        for tp in (1, 2, 4):
            assert rank[family, kind, tp] == right[family, kind], tp
