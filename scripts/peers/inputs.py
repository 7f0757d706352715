"""Writes what all contestants start from: `python -m peers.inputs MODEL STEPS CACHE_DIR FOLDER`.

The folder is a Hugging Face model directory (config.json, model.safetensors) with the batches beside it (tokens.npy,
int64, (steps, batch, seq_len + 1)), taken from tptrain itself: tptrain run with the same settings starts from the same
weights and sees the same batches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from .cells import MODELS, SEED, Model
from .settings import overrides


def family_settings(model: Model) -> dict[str, Any]:
    """The config.json that Transformers writes for a family in this shape; other fields as it has them by itself."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(
        model.family,
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.ffn,
        max_position_embeddings=model.seq_len,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return config.to_dict() | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.family]]}


def write_weights(model: Model, cache_dir: Path, folder: Path) -> None:
    """tptrain's step-0 weights, whole and float32, and the config.json beside them."""
    from tptrain.checkpoint.huggingface import to_theirs
    from tptrain.config import load_config
    from tptrain.models.families import llama
    from tptrain.models.settings import decoder_spec, family
    from tptrain.nn.decoder import Decoder
    from tptrain.nn.parameter import initial_values, parameters
    from tptrain.ops.table import REFERENCE
    from tptrain.parallel.connect import connect
    from tptrain.parallel.mesh import tp_grid

    if model.family:
        (folder / "config.json").write_text(json.dumps(family_settings(model), indent=1))
    config = load_config(overrides(model, "fp32", cache_dir, directory=folder if model.family else None))
    spec = decoder_spec(config.model)
    maps = family(config.model) if model.family else llama
    decoder = Decoder(spec, connect(tp_grid(1, 1, model.kv_heads), torch.device("cpu")), REFERENCE)
    weights = {name: initial_values(name, p, config.train.seed) for name, p in parameters(decoder)}
    save_file(to_theirs(spec, maps.keys(spec), weights), folder / "model.safetensors", metadata={"format": "pt"})
    if not model.family:
        (folder / "config.json").write_text(json.dumps(llama.to_config(spec) | {"use_cache": False}, indent=1))


def write_tokens(model: Model, steps: int, cache_dir: Path, path: Path) -> None:
    from tptrain.config import load_config
    from tptrain.data.order import TokenData
    from tptrain.data.packing import prepare

    config = load_config(overrides(model, "fp32", cache_dir))
    data = TokenData(prepare(config.data), model.seq_len, SEED)
    np.save(path, np.stack([data.samples(step * model.batch, model.batch) for step in range(steps)]))


if __name__ == "__main__":
    chosen, cache, folder = MODELS[sys.argv[1]], Path(sys.argv[3]), Path(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(chosen, cache, folder)
    write_tokens(chosen, int(sys.argv[2]), cache, folder / "tokens.npy")
