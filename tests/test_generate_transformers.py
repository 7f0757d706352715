"""engine=transformers: greedy tokens and their logits against Transformers' `generate` in one process, at tp 2 and 4;
and that our sampler and our stops decide, and no settings of the model's own.
"""

import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as hf
from transformers import cache_utils
from transformers.generation import utils

from tests import zoo, zoo_generate
from tests.zoo_generate import MUTATIONS, NEW, Generated, model_of, prompts
from tests.zoo_pool import Pool, lasting
from tests.zoo_table import PLANLESS
from tptrain.config import UserError
from tptrain.config.schema import ModelConfig
from tptrain.generate.decode import Continuation, decode
from tptrain.generate.sample import Sampler, Sampling
from tptrain.hf.model import TransformersModel
from tptrain.models.settings import decoder_spec
from tptrain.nn.decoder import Decoder
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

# Experts; a recurrent state and a convolution; latent attention with an indexer; keys that layers share, and windows;
# convolutions, in a plan of ours; a cache of the family's own; an embedding of positions.
FAMILIES = ["mixtral", "qwen3_next", "deepseek_v32", "gemma4_text", "lfm2", "minimax", "opt"]
BROKEN = {  # the family that shows a mutation
    "see the padding": "lfm2",
    "keys of another rank's heads": "mixtral",
    "count columns anew on each rank": "mixtral",
    "leave logits unscaled": "cohere",
}
Rows = list[tuple[list[int], str]]  # of each its ids and its end


@pytest.fixture(scope="module")
def four() -> Iterator[Pool]:
    with lasting(4) as pool:
        yield pool


@functools.cache
def _generated(family: str) -> Generated:
    return zoo_generate.generated(family)


def _difference(right: Generated, degrees: tuple[int, ...], mutation: str = "") -> str:
    parts = {tp: zoo_generate.difference(right, tp, mutation) for tp in degrees}
    return "; ".join(f"tp={tp}: {part}" for tp, part in parts.items() if part)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "generating" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-family")
        metafunc.parametrize("generating", [*zoo.families(), *PLANLESS] if every else FAMILIES)


# ------------------------------------------------------------------------------------------------ against one process


def test_greedy_tokens_are_those_of_one_process(generating: str, four: Pool) -> None:
    assert not any(four.run(_difference, _generated(generating), (2, 4)))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_code_is_noticed(mutation: str, four: Pool) -> None:
    assert all(four.run(_difference, _generated(BROKEN[mutation]), (2,), mutation))


# ------------------------------------------------------------------------------------------------------------ sampling


def _sampled(right: Generated) -> list[list[list[int]]]:
    """Tokens of the native decoder, and of Transformers' model at tp 1, 2 and 4."""
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=5)
    source = right.config.to_dict()
    spec = decoder_spec(ModelConfig(path="DIR", source=source))
    native = Decoder(spec, zoo_generate.mesh_of(1, spec.kv_heads), REFERENCE)
    weights = zoo_generate.to_native(right)
    Store(native, torch.float32).initialise(lambda name, p: weights[name])
    models = [native, *(model_of(right.config, right.weights, tp) for tp in (1, 2, 4))]
    return [[ids for ids, _ in _rows(model, sampling=sampling)] for model in models]


def _rows(model: Any, new: int = NEW, finished: Any = lambda row: False, sampling: Sampling | None = None) -> Rows:
    sampler = Sampler(model.output_head, model.mesh, sampling or Sampling())
    return [(row.ids, row.end) for row in decode(model, sampler, list(enumerate(prompts("unequal"))), new, finished)]


def test_sampled_tokens_are_the_same_in_both_engines_at_any_tp(four: Pool) -> None:
    for native, *others in four.run(_sampled, _generated("llama")):
        assert native != _generated("llama").tokens["unequal"]
        assert all(each == native for each in others)


# ------------------------------------------------------------------------------------------------------ in one process


@functools.cache
def _alone(family: str, **changes: Any) -> TransformersModel:
    right = zoo_generate.generated(family, kinds=(), **changes)
    return model_of(right.config, right.weights)


def test_a_row_that_ends_leaves_the_others_alone() -> None:
    model, seen = _alone("mixtral"), []
    plain = _rows(model)
    assert [end for _, end in plain] == ["length"] * 4

    def finished(row: Continuation) -> bool:
        seen.append((row.number, len(row.ids)))
        return (row.number, len(row.ids)) in {(1, 1), (3, 5)}

    expected = [
        (ids[: {1: 1, 3: 5}.get(i, NEW)], "stop" if i in (1, 3) else "length") for i, (ids, _) in enumerate(plain)
    ]
    assert _rows(model, finished=finished) == expected
    assert sorted(seen) == sorted((i, n + 1) for i, (ids, _) in enumerate(expected) for n in range(len(ids)))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_rows_end_at_the_last_position(family: str) -> None:
    """The longest prompt ends first; the others go on, as each would alone."""
    model = _alone(family, max_position_embeddings=17)
    rows = _rows(model, new=100)
    for number, prompt in enumerate(prompts("unequal")):
        assert len(prompt) + len(rows[number][0]) == 17
        sampler = Sampler(model.output_head, model.mesh, Sampling())
        (single,) = decode(model, sampler, [(number, prompt)], 100, lambda row: False)
        assert rows[number] == (single.ids, "length")


def test_the_models_own_settings_are_not_used_and_come_back() -> None:
    model = _alone("mixtral")
    plain = _rows(model)
    own = hf.GenerationConfig(
        do_sample=True, eos_token_id=plain[0][0][0], repetition_penalty=9.0, max_new_tokens=2, suppress_tokens=[5]
    )
    model.inner.generation_config = own
    model.inner.train()
    seen = []
    assert _rows(model, finished=lambda row: bool(seen.append(model.inner.training))) == plain
    assert not any(seen)
    assert model.inner.training
    assert model.inner.generation_config is own
    with pytest.raises(ZeroDivisionError):
        _rows(model, finished=lambda row: bool(1 // 0))
    assert model.inner.training
    model.inner.eval()
    _rows(model, new=1)
    assert not model.inner.training


def test_the_cache_is_freed() -> None:
    model, caches = _alone("mixtral"), []

    class Watched(cache_utils.DynamicCache):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            caches.append(weakref.ref(self))

    with patch.object(utils, "DynamicCache", Watched):
        _rows(model)
    gc.collect()
    assert len(caches) == 1
    assert caches[0]() is None
    assert model.lm_head.input is None


def _with_sizes_of_the_config(right: Generated, tp: int) -> str:
    """The refusal of a cache that has as many heads as the config."""
    heads = right.config.num_key_value_heads

    def lazy_initialization(self: Any, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = (x.new_empty(len(x), heads, 0, x.shape[-1]) for x in (key_states, value_states))

    model = model_of(right.config, right.weights, tp)
    with patch.object(cache_utils.DynamicLayer, "lazy_initialization", lazy_initialization):
        try:
            _rows(model)
        except UserError as error:
            return str(error)
    return ""


def test_a_cache_that_cannot_be_cut_is_refused_by_name(four: Pool) -> None:
    for refusal in four.run(_with_sizes_of_the_config, _generated("mixtral"), 2):
        assert refusal.startswith("generate: the cache of MixtralForCausalLM cannot be cut by parallel.tp=2 (Sizes of")
        assert refusal.endswith("Use parallel.tp=1.")
    assert not any(four.run(_with_sizes_of_the_config, _generated("mixtral"), 1))


def _with_a_mistake_of_the_callers(right: Generated, tp: int) -> str:
    """The error that comes of one in `finished`, which no cache is to blame for."""
    with pytest.raises(IndexError) as error:
        _rows(model_of(right.config, right.weights, tp), finished=lambda row: bool([][0]))
    return str(error.value)


def test_a_mistake_of_the_callers_is_no_refusal(four: Pool) -> None:
    assert set(four.run(_with_a_mistake_of_the_callers, _generated("mixtral"), 2)) == {"list index out of range"}
