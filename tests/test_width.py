"""`verify.width` of Transformers' models: sizes shrink in proportion, heads keep their numbers, and what does not is
refused by its name. test_verify_transformers.py proves narrower models on ranks.
"""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from launch import verify
from tests.wide import MODELS, TP, WIDTH, config, source
from tptrain.config import UserError
from tptrain.config.schema import RunConfig
from tptrain.models.cut import cut_of

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


# ------------------------------------------------------------------------------------------------------- in proportion


def _narrowed(family: str, width: int = WIDTH, **changes: Any) -> tuple[Any, Any]:
    """The config, and the narrower one."""
    from tptrain.hf.model import read_config
    from tptrain.hf.width import narrow, widths

    whole = read_config(source(family) | changes, 0.0)
    narrower = copy.deepcopy(whole)
    narrow(narrower, widths(whole, width, TP))
    return whole, narrower


PROPORTIONS = {  # by family: fields, and their sizes in the model and in the narrower one
    "llama": {("hidden_size", 256, 64), ("intermediate_size", 768, 192), ("head_dim", 32, 8)},
    "gpt2": {("n_embd", 256, 64)},
    "gemma4_text": {
        ("hidden_size", 256, 64),
        ("intermediate_size", 768, 192),
        ("head_dim", 64, 16),
        ("head_dim", 128, 32),  # of global layers
    },
    "deepseek_v3": {
        ("hidden_size", 256, 64),
        ("intermediate_size", 768, 192),
        ("moe_intermediate_size", 128, 32),
        ("q_lora_rank", 64, 16),
        ("kv_lora_rank", 64, 16),
        ("qk_head_dim", 48, 12),
        ("qk_nope_head_dim", 32, 8),
        ("qk_rope_head_dim", 16, 4),
        ("v_head_dim", 32, 8),
        ("head_dim", 16, 4),
    },
    "phi3": {
        ("hidden_size", 256, 64),
        ("intermediate_size", 768, 192),
        ("short_factor", 12, 3),
        ("long_factor", 12, 3),
    },
}


@pytest.mark.parametrize("family", PROPORTIONS)
def test_sizes_shrink_in_proportion(family: str) -> None:
    assert set(cut_of(config(family)).widths) == PROPORTIONS[family]


def test_sizes_are_rounded_as_in_native_models() -> None:
    from tptrain.hf.model import read_config
    from tptrain.hf.width import widths

    config = read_config(source("llama"), 0.0)
    assert set(widths(config, 100, 3)) == {
        ("hidden_size", 256, 100),
        ("intermediate_size", 768, 288),  # a multiple of 8 and of the ranks
        ("head_dim", 32, 12),  # even
    }
    assert ("head_dim", 32, 4) in widths(config, 16, 1)
    assert ("qk_head_dim", 48, 14) in widths(read_config(source("deepseek_v3"), 0.0), 80, 1)  # 10 and 4
    partial = read_config(source("qwen3_next"), 0.0)  # a quarter of a head is rotary
    assert ("head_dim", 64, 24) in widths(partial, 100, 1)


@pytest.mark.parametrize("family", MODELS)
def test_heads_and_experts_keep_their_numbers(family: str) -> None:
    """Fields that count are the same, and as many heads of queries share one of keys."""
    from tptrain.hf.model import build

    whole, narrower = _narrowed(family)
    for name, value in vars(whole).items():
        if re.search("num_|n_head|n_group|expert", name) and "size" not in name:
            assert vars(narrower)[name] == value, name
    ratios = [_queries_to_keys(build(each)) for each in (whole, narrower)]
    assert ratios[0] == ratios[1]
    assert ratios[0] or family in (
        "deepseek_v3",
        "gpt2",
        "gpt_neox",
        "falcon",
        "phi3",
    )  # which have no q_proj and k_proj


def _queries_to_keys(model: nn.Module) -> dict[str, float]:
    """By the name of the attention, features of queries over those of keys."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    pairs = {name: f"{name.removesuffix('q_proj')}k_proj" for name in linears if name.endswith("q_proj")}
    return {q: linears[q].out_features / linears[k].out_features for q, k in pairs.items() if k in linears}


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "width", "changes", "message"),
    [
        ("llama", 64, {"memory_dim": 512}, "the config of llama has memory_dim=512, a size of which tptrain does not"),
        ("llama", 64, {"mixer": {"memory_dim": [8, 512]}}, "the config of llama has memory_dim=8, a size"),
        (
            "gpt2",
            60,
            {},
            "the 8 heads of gpt2 are hidden_size / 8 wide. Use a multiple of 16, or leave verify.width out",
        ),
    ],
)
def test_what_cannot_shrink_is_named(family: str, width: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        _narrowed(family, width, **changes)
    assert str(error.value).startswith(f"verify.width={width}: {message}")
    assert "eave verify.width out" in str(error.value)


def test_a_model_that_would_be_cut_otherwise_is_refused() -> None:
    """8 features of FFN for 2 ranks, where the plan has cuts that a proposal makes only if the ranks divide them."""
    from tptrain.hf.resolve import resolve_cut

    def odd(size: int, ratio: float, tp: int) -> int:
        return 33

    with patch("tptrain.hf.width.smaller_features", odd), pytest.raises(UserError) as error:
        resolve_cut(source("bamba"), {}, 0.0, None, WIDTH, TP)  # it has no plan: one is proposed
    assert str(error.value).startswith("verify.width=64: model.layers.0.feed_forward.gate_proj.weight would be absent")


def test_a_model_that_does_not_work_so_narrow_is_refused() -> None:
    from tptrain.hf.resolve import resolve_cut
    from tptrain.hf.width import blamed_on_width

    def odd(size: int, ratio: float, tp: int) -> int:
        return 33

    with patch("tptrain.hf.width.smaller_features", odd), pytest.raises(UserError) as error:
        resolve_cut(source("llama"), {}, 0.0, None, WIDTH, TP)
    assert str(error.value).startswith("verify.width=64: llama does not work so narrow: parallel.tp=2: does not divide")
    with pytest.raises(UserError, match="x does not work so narrow: mat1 and mat2 shapes"), blamed_on_width(64, "x"):
        torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="out of memory"), blamed_on_width(64, "x"):
        raise RuntimeError("CUDA: out of memory")
    with pytest.raises(RuntimeError, match="mat1"), blamed_on_width(None, "x"):
        torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_card_has_the_sizes(tmp_path: Path) -> None:
    mixtral = replace(config("mixtral"), run=RunConfig(dir=str(tmp_path)))
    with patch("launch.verify.ask_for_cut"):
        prepared, smaller, world = verify.prepare(mixtral)
        model = replace(mixtral, verify=replace(mixtral.verify, weights="model"))
        with pytest.raises(UserError, match=r"verify\.weights=model: verify\.width and verify.vocab shrink it"):
            verify.prepare(model)
        wider = replace(mixtral, verify=replace(mixtral.verify, width=512))
        with pytest.raises(UserError, match=r"verify\.width=512: more than the model's 256"):
            verify.prepare(wider)
    assert (prepared.verify.weights, world) == ("random", TP)
    facts = verify._facts(prepared, smaller, world)
    assert "width 64 for 256, vocabulary 256" in str(facts["model"])
    assert facts["sizes"] == "hidden_size 64 for 256, intermediate_size 192 for 768"
