"""Small Hugging Face models as the independent reference: loss, gradients and one AdamW step."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.checkpoint import huggingface
from tptrain.config import ModelConfig
from tptrain.config.schema import RopeScaling
from tptrain.models.families import FAMILIES
from tptrain.models.settings import decoder_spec

BATCH, SEQ_LEN, VOCAB = 4, 24, 250  # 250 is padded to 256: the padding must not matter
# AdamW's first step is lr * g / (|g| + eps): a tiny eps would make full steps of the rounding in zero gradients.
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-5, 0.1, 0.5


@dataclass
class Case:
    """An architecture, and the family of Transformers' model that is its reference."""

    family: str
    ours: ModelConfig


def _config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    return ModelConfig(**(base | changes))


CASES = {
    "llama_gqa": Case("llama", _config()),
    "llama_kv_replicated": Case("llama", _config(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "llama_mqa_tied_geglu": Case(
        "llama", _config(num_key_value_heads=1, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh")
    ),
    "llama_mha_rope_scaled": Case(
        "llama",
        _config(
            num_key_value_heads=8,
            rope_scaling=RopeScaling(rope_type="llama3", factor=4.0, original_max_position_embeddings=16),
        ),
    ),
    "qwen3": Case("qwen3", _config(num_key_value_heads=2, qk_norm=True, head_dim=16, rms_norm_eps=1e-6)),
    "gpt2": Case(
        "gpt2",
        _config(
            num_key_value_heads=8,
            position_embedding="learned",
            norm="layernorm",
            hidden_act="gelu_new",
            gated_ffn=False,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
    ),
}


def hf_model(case: Case) -> torch.nn.Module:
    import transformers as hf

    source = case.ours.source or FAMILIES[case.family].to_config(decoder_spec(case.ours))
    config = hf.AutoConfig.for_model(**source)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def to_ours(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By our names, in our layouts."""
    spec = decoder_spec(case.ours)
    if case.family == "gpt_neox":  # Transformers 5 has another name for it in memory than in files
        tensors = tensors | {"embed_out.weight": tensors["lm_head.weight"]}
    ours = huggingface.to_ours(spec, FAMILIES[case.family].keys(spec), tensors)
    return {name: tensor.detach().clone().contiguous() for name, tensor in ours.items()}


@dataclass
class Reference:
    weights: dict[str, Tensor]
    tokens: Tensor  # (B, T + 1)
    loss: float
    logits: Tensor  # (B, T, V) unpadded
    grads: dict[str, Tensor]
    norm: float
    stepped: dict[str, Tensor]  # weights after one AdamW step


def compute(case: Case) -> Reference:
    torch.manual_seed(0)
    model = hf_model(case).train()
    with torch.no_grad():  # away from the ones and zeros that hide mistakes
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.05))
    weights = to_ours(case, dict(model.named_parameters()))
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1))
    logits = model(tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    grads = to_ours(case, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False, fused=False).step()
    stepped = to_ours(case, dict(model.named_parameters()))
    return Reference(weights, tokens, loss.item(), logits.detach(), grads, norm.item(), stepped)
