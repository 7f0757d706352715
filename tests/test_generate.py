"""Continuations against Transformers' `generate`, of every native family, at tp 1, 2 and 4; and what is drawn."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import reference as ref
from tests.distributed import mesh, run_ranks
from tests.families import FAMILIES, WINDOW
from tptrain.generate.cache import Cache, Cached, LayerCache
from tptrain.generate.decode import decode
from tptrain.generate.sample import Sampler, Sampling
from tptrain.models.settings import decoder_spec
from tptrain.nn.cross_entropy import OutputHead
from tptrain.nn.decoder import Decoder
from tptrain.nn.parameter import parameter, sharding
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE
from tptrain.parallel.collectives import NOTHING

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


def model_of(case: ref.Case, weights: dict[str, Tensor], tp: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """Without values where there are no weights."""
    spec = decoder_spec(case.ours)
    model = Decoder(spec, mesh(tp, spec.kv_heads, shared=tp > 1), REFERENCE)
    store = Store(model, dtype)

    def slice_of(name: str, p: Any) -> Tensor:
        place = zip(p.sharding.offsets, p.sharding.local_shape, strict=True)
        return weights[name][tuple(slice(start, start + length) for start, length in place)]

    if weights:
        store.initialise(slice_of)
    return model


def _greedy(model: Decoder) -> Sampler:
    return Sampler(model.output_head, model.mesh, Sampling())


def _ours(case: ref.Case, weights: dict[str, Tensor], prompts: list[list[int]], tp: int) -> list[list[int]]:
    model = model_of(case, weights, tp)
    rows = decode(model, _greedy(model), list(enumerate(prompts)), NEW, lambda row: False)
    return [row.ids for row in rows]


@pytest.fixture(scope="module")
def of_families() -> tuple[dict[Any, Any], list[Any]]:
    """Every family's continuations: Transformers' by (family, kind of prompts), ours on each rank by tp too."""
    tasks, right = {}, {}
    for family, case in FAMILIES.items():
        model = hf_model(case)
        tasks[family] = case, ref.to_ours(case, dict(model.named_parameters()))
        for kind, lengths in PROMPTS.items():
            right[family, kind] = _theirs(model, _prompts(lengths))
    return right, run_ranks(4, _of_families, tasks)


def hf_model(case: ref.Case) -> Any:
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


# ------------------------------------------------------------------------------------------------------------ mutations


@contextmanager
def _padding_is_seen() -> Iterator[None]:
    right = Cached._visible

    def visible(self: Cached, keys: Tensor, window: int | None) -> Tensor | None:
        mask = right(self, keys, window)
        return None if mask is None else mask.any(0, keepdim=True)

    with patch.object(Cached, "_visible", visible):
        yield


@contextmanager
def _positions_count_padding() -> Iterator[None]:
    right = Cached.__init__

    def init(self: Cached, cache: Cache, tokens: Tensor) -> None:
        right(self, cache, tokens)
        self.places = torch.arange(self.first, self.first + self.T).repeat(len(tokens))

    with patch.object(Cached, "__init__", init):
        yield


@contextmanager
def _a_slot_too_few() -> Iterator[None]:
    right = LayerCache.__init__

    def init(self: LayerCache, layer: Any, rows: int, columns: int, like: Tensor) -> None:
        right(self, layer, rows, columns, like)
        if self.slots < columns:
            self.slots -= 1

    with patch.object(LayerCache, "__init__", init):
        yield


@pytest.mark.parametrize(
    ("family", "mutation"),
    [("gpt2", _padding_is_seen), ("gpt2", _positions_count_padding), ("mistral", _a_slot_too_few)],
)
def test_a_mistake_changes_the_tokens(family: str, mutation: Any) -> None:
    case = FAMILIES[family]
    model = hf_model(case)
    weights, prompts = ref.to_ours(case, dict(model.named_parameters())), _prompts(PROMPTS["unequal"])
    right = _ours(case, weights, prompts, 1)
    assert right == _theirs(model, prompts)
    with mutation():
        assert _ours(case, weights, prompts, 1) != right


# ----------------------------------------------------------------------------------------------------------------- ends


def test_a_row_that_ends_leaves_the_others_as_they_were() -> None:
    case = FAMILIES["mistral"]
    model = hf_model(case)
    prompts = _prompts(PROMPTS["unequal"])
    ours = model_of(case, ref.to_ours(case, dict(model.named_parameters())), 1)
    whole = _theirs(model, prompts)
    ends = {whole[0][4], whole[2][9]}
    expected = []
    for row in whole:
        length = next((place + 1 for place, token in enumerate(row) if token in ends), NEW)
        expected.append((row[:length], "stop" if row[length - 1] in ends else "length"))
    assert {end for _, end in expected} == {"stop", "length"}
    rows = decode(ours, _greedy(ours), list(enumerate(prompts)), NEW, lambda row: row.ids[-1] in ends)
    assert [(row.ids, row.end) for row in rows] == expected


def test_the_last_position_is_the_last_token() -> None:
    """Of 64 positions, a prompt takes 60: the token after the last one is there still, and no more."""
    case = FAMILIES["gpt2"]
    model = hf_model(case)
    prompts = _prompts([60, 3])
    ours = model_of(case, ref.to_ours(case, dict(model.named_parameters())), 1)
    rows = decode(ours, _greedy(ours), list(enumerate(prompts)), NEW, lambda row: False)
    assert [(len(row.ids), row.end) for row in rows] == [(4, "length"), (NEW, "length")]
    assert rows[0].ids == _theirs(model, prompts[:1], 4)[0]


# --------------------------------------------------------------------------------------------------------------- memory


def _cache_bytes(case: ref.Case, tp: int) -> int:
    return Cache(model_of(case, {}, tp), 3, 40).bytes


@pytest.mark.parametrize(("family", "kept"), [("llama", 40), ("mistral", WINDOW)])
def test_a_cache_takes_what_the_closed_form_says(family: str, kept: int) -> None:
    """2 L B min(C, W) K/tp d elements; two KV heads on four ranks are one each."""
    for tp, heads in ((1, 2), (2, 1), (4, 1)):
        for rank in run_ranks(tp, _cache_bytes, FAMILIES[family], tp):
            assert rank == 2 * 2 * 3 * kept * heads * 8 * 4


# ----------------------------------------------------------------------------------------------------------------- bf16


def _cached_logits(case: ref.Case, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(B, T, V/tp) in bf16: of a prompt of 9 tokens at once, then one by one."""
    model = model_of(case, weights, 2, torch.bfloat16)
    cache, rows = Cache(model, len(tokens), tokens.shape[1]), []
    for part in (tokens[:, :9], *tokens[:, 9:].split(1, dim=1)):
        rows.append(model.logits(cache.forward(part).flatten(0, 1)).view(*part.shape, -1))
    return torch.cat(rows, dim=1).detach().float()


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_bf16_is_as_near_as_transformers_is(family: str) -> None:
    case = FAMILIES[family]
    model = hf_model(case)
    weights, tokens = ref.to_ours(case, dict(model.named_parameters())), torch.randint(3, ref.VOCAB, (2, 24))
    with torch.no_grad():
        exact = model(tokens).logits
        theirs = model.bfloat16()(tokens).logits.float()
    parts = run_ranks(2, _cached_logits, case, weights, tokens)
    ours = torch.cat(parts, dim=-1)[..., : ref.VOCAB]
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


# ------------------------------------------------------------------------------------------------------------- sampling

SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, top_k=7),
    Sampling(temperature=2.0, top_p=0.6),
    Sampling(temperature=1.5, top_k=20, top_p=0.8),
    Sampling(temperature=1.0, top_k=10**6),
    Sampling(temperature=1.0, top_p=1e-6),
]
DRAWS = 2000


def _logits() -> Tensor:
    return 3 * torch.randn(1, ref.VOCAB, generator=torch.Generator().manual_seed(2))


def _draws(sampling: Sampling, tp: int) -> list[int]:
    """Tokens of one row of logits at many positions; columns of padding have the largest logits of all."""
    grid = mesh(tp)
    p = parameter(grid, sharding(grid, (256, 4), {0: "tp"}))
    columns = F.pad(_logits(), (0, 6), value=100.0)  # (1, V), padded
    local = columns.chunk(tp, dim=1)[grid.index("tp")].expand(DRAWS, -1)  # (B, V/tp)
    sampler = Sampler(OutputHead(p, ref.VOCAB), grid, sampling)
    return sampler.choose(local, [(0, position) for position in range(DRAWS)]).tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_are_drawn_from_the_distribution_of_transformers(sampling: Sampling) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores: Any = TemperatureLogitsWarper(sampling.temperature)(None, _logits())  # type: ignore[arg-type]
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)  # type: ignore[arg-type]
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)  # type: ignore[arg-type]
    probabilities = scores.softmax(-1)[0]
    counts = Counter(_draws(sampling, 1))
    assert all(probabilities[token] > 0 for token in counts)
    for token, probability in enumerate(probabilities.tolist()):  # five standard deviations of a binomial count
        spread = (DRAWS * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - DRAWS * probability) <= 5 * spread + 1, token


def _all_draws(tp: int) -> list[list[int]]:
    return [_draws(sampling, tp) for sampling in SAMPLINGS]


def test_draws_do_not_depend_on_the_ranks() -> None:
    alone = _all_draws(1)
    for tp in (2, 4):
        for rank in run_ranks(tp, _all_draws, tp):
            assert rank == alone


def _of_own_columns(tp: int) -> list[int]:
    with patch("tptrain.nn.cross_entropy.all_gather", lambda own, group: (own, NOTHING)):
        return _draws(Sampling(), tp)


def test_a_rank_that_asks_nobody_takes_another_token() -> None:
    right = _draws(Sampling(), 1)
    assert right == [int(_logits().argmax())] * DRAWS
    assert any(rank != right for rank in run_ranks(2, _of_own_columns, 2))
