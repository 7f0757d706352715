"""Writes what all contestants start from: `python -m peers.inputs MODEL STEPS CACHE_DIR FOLDER`.

The folder is a Hugging Face model directory (config.json, model.safetensors) with the batches beside it (tokens.npy,
int64, (steps, batch, seq_len + 1)), taken from tptrain itself: tptrain run with the same settings starts from the same
weights and sees the same batches.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from .cells import MODELS, SEED, Model
from .settings import overrides


def write_weights(model: Model, cache_dir: Path, path: Path) -> None:
    """tptrain's step-0 weights under Hugging Face's names, float32, whole. The one place that builds a Decoder."""
    from tptrain.config import load_config
    from tptrain.layers import initial_values, parameters
    from tptrain.mesh import make_mesh
    from tptrain.model import Decoder

    config = load_config(overrides(model, "fp32", cache_dir))
    decoder = Decoder(config.model, make_mesh(1, model.kv_heads, torch.device("cpu")))
    weights = {name: initial_values(name, p, config.train.seed, 0) for name, p in parameters(decoder)}
    renamed = {name if name.startswith("lm_head") else f"model.{name}": weight for name, weight in weights.items()}
    save_file(renamed, path, metadata={"format": "pt"})


def write_tokens(model: Model, steps: int, cache_dir: Path, path: Path) -> None:
    from tptrain.config import load_config
    from tptrain.data import TokenData, prepare

    config = load_config(overrides(model, "fp32", cache_dir))
    data = TokenData(prepare(config.data), model.seq_len, SEED)
    np.save(path, np.stack([data.samples(step * model.batch, model.batch) for step in range(steps)]))


def write_config(model: Model, path: Path) -> None:
    """Hugging Face's config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn,
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": False,
    }
    path.write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    chosen, cache, folder = MODELS[sys.argv[1]], Path(sys.argv[3]), Path(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    write_config(chosen, folder / "config.json")
    write_weights(chosen, cache, folder / "model.safetensors")
    write_tokens(chosen, int(sys.argv[2]), cache, folder / "tokens.npy")
