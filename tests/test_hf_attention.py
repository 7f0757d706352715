"""Our attention in Transformers' models, in one process: which calls it takes, and that they give what SDPA gives."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests import zoo
from tptrain.hf import attention
from tptrain.hf.model import build, read_config
from tptrain.ops.table import REFERENCE

CASES = {  # family, changes of its config, and whether every layer's mask is one that is known
    "causal": ("llama", {}, True),
    "a window in every layer": ("mistral", {"sliding_window": 8}, True),
    "a window in some layers": ("gemma3_text", {"sliding_window": 8}, True),
    "a window as long as the sequence": ("mistral", {"sliding_window": zoo.SEQ_LEN}, True),
    "chunks": ("llama4_text", {"attention_chunk_size": 8}, False),
    "keys that an indexer picks": ("deepseek_v32", {"index_topk": 4}, False),
    "code that asks for sdpa by name": ("falcon", {"new_decoder_architecture": True}, True),
}


@pytest.mark.filterwarnings("ignore::Warning:transformers")
@pytest.mark.parametrize("case", CASES)
def test_as_sdpa(case: str) -> None:
    family, changes, known = CASES[case]
    model = zoo.model(family, **changes)
    model.set_attn_implementation("sdpa")
    model.config.get_text_config()._attn_implementation = "sdpa"  # the call is of no effect on some
    tokens = zoo.tokens()
    loss, logits = zoo.loss_and_logits(model, tokens)
    loss.backward()
    right = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs: list[Any] = []

    def noted(*arguments: Any, **named: Any) -> Any:
        theirs.append(arguments[0])
        return sdpa(*arguments, **named)

    sdpa = attention.sdpa_attention_forward
    attention.use_ours(model, REFERENCE)
    with patch.object(attention, "sdpa_attention_forward", noted):
        ours, own = zoo.loss_and_logits(model, tokens)
        ours.backward()
    assert (not theirs) == known
    torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        if name in right:
            torch.testing.assert_close(p.grad, right[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::Warning:transformers")
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text"])
def test_picked_keys_stay_picked(family: str) -> None:
    """These mask the other keys where their attention is called SDPA, and leave that to the function else."""
    model = zoo.model(family)
    model.set_attn_implementation("sdpa")
    _, logits = zoo.loss_and_logits(model, zoo.tokens())
    attention.use_ours(model, REFERENCE)
    _, own = zoo.loss_and_logits(model, zoo.tokens())
    torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::Warning:transformers")
@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_scores_with_a_cap_are_not_left_to_sdpa(family: str) -> None:
    """It has none, and Transformers before 5.21 does not say so."""
    settings = zoo.config(family, attn_logit_softcapping=2.0).to_dict()
    assert build(read_config(settings, 0.0)).config._attn_implementation == "eager"


def test_what_attention_returns_can_be_viewed() -> None:
    """As SDPA's: AFMoE's code takes a view of it, and so a dry run of it failed."""
    module: Any = torch.nn.Module()
    module.operations = REFERENCE
    q, k = (torch.empty(1, heads, 6, 4, device="meta") for heads in (4, 2))
    y, _ = attention.attention(module, q, k, k, None)
    assert y.view(1, 6, -1).shape == (1, 6, 16)


@pytest.mark.filterwarnings("ignore::Warning:transformers")
def test_a_mask_that_a_model_has_changed_goes_to_sdpa() -> None:
    mask = attention.mask(1, 6, 6, mask_function=_window(3), local_size=3, device="cpu")
    assert isinstance(mask, attention.WindowMask)
    assert mask.window == 3
    assert getattr(mask[:, :, :4], "window", None) is None
    chunks = attention.mask(1, 6, 6, mask_function=_chunks(3), local_size=3, device="cpu")
    assert chunks is not None
    assert not isinstance(chunks, attention.WindowMask)


def _window(size: int) -> Any:
    from transformers.masking_utils import sliding_window_causal_mask_function

    return sliding_window_causal_mask_function(size)


def _chunks(size: int) -> Any:
    from transformers.masking_utils import chunked_causal_mask_function

    return chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
