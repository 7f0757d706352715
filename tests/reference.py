"""Small Hugging Face models as the independent reference: loss, gradients and one AdamW step."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.config import ModelConfig
from tptrain.config.schema import RopeScaling, padded_vocab_size

BATCH, SEQ_LEN, VOCAB = 4, 24, 250  # 250 is padded to 256: the padding must not matter
# AdamW's first step is lr * g / (|g| + eps): a tiny eps would make full steps of the rounding in zero gradients.
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-5, 0.1, 0.5


@dataclass
class Case:
    """One architecture in both spellings."""

    hf: str
    ours: ModelConfig
    hf_extra: dict[str, Any] = field(default_factory=dict)


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

    c = case.ours
    if case.hf == "gpt2":
        config = hf.GPT2Config(
            vocab_size=c.vocab_size,
            n_embd=c.hidden_size,
            n_layer=c.num_hidden_layers,
            n_head=c.num_attention_heads,
            n_inner=c.intermediate_size,
            n_positions=c.max_position_embeddings,
            layer_norm_epsilon=c.rms_norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return hf.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling.rope_type == "llama3":
        rope = vars(c.rope_scaling) | {"rope_theta": c.rope_theta}
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
    names += ["intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]
    names += ["hidden_act", "attention_bias"]
    settings: dict[str, Any] = {name: value for name in names if (value := getattr(c, name)) is not None}
    settings["rope_parameters"] = rope
    if case.hf == "llama":
        config = hf.LlamaConfig(**settings, mlp_bias=c.mlp_bias)
        return hf.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    return hf.Qwen3ForCausalLM._from_config(hf.Qwen3Config(**settings), attn_implementation="eager")


def to_ours(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names and layouts to ours; vocabulary rows are padded with zeros."""
    out: dict[str, Tensor] = {}
    if case.hf == "gpt2":
        names = {
            "wte.weight": "embed_tokens.weight",
            "wpe.weight": "embed_positions",
            "ln_f": "norm",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.c_fc": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
            "h.": "layers.",
        }
        for name, tensor in tensors.items():
            if name.startswith("lm_head"):
                continue
            new = name.removeprefix("transformer.")
            for theirs, mine in names.items():
                new = new.replace(theirs, mine)
            is_conv = tensor.dim() == 2 and "embed" not in new
            tensor = tensor.t() if is_conv else tensor  # Conv1D holds (in, out)
            if "attn.c_attn" in new:
                for part, letter in zip(tensor.chunk(3), "qkv", strict=True):
                    out[new.replace("attn.c_attn", f"self_attn.{letter}_proj")] = part
            else:
                out[new] = tensor
    else:
        tied = case.ours.tie_word_embeddings
        out = {name.removeprefix("model."): t for name, t in tensors.items() if not (tied and name == "lm_head.weight")}
    rows = padded_vocab_size(case.ours.vocab_size) - case.ours.vocab_size
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in out:
            out[name] = F.pad(out[name], (0, 0, 0, rows))
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


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
