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


def write_weights(model: Model, cache_dir: Path, folder: Path) -> None:
    """tptrain's step-0 weights, whole and float32, and the config.json beside them."""
    from tptrain.checkpoint.huggingface import to_theirs
    from tptrain.config import load_config
    from tptrain.models.families import llama
    from tptrain.models.settings import decoder_spec
    from tptrain.nn.decoder import Decoder
    from tptrain.nn.parameter import initial_values, parameters
    from tptrain.ops.table import REFERENCE
    from tptrain.parallel.connect import connect
    from tptrain.parallel.mesh import tp_grid

    config = load_config(overrides(model, "fp32", cache_dir))
    spec = decoder_spec(config.model)
    decoder = Decoder(spec, connect(tp_grid(1, 1, model.kv_heads), torch.device("cpu")), REFERENCE)
    weights = {name: initial_values(name, p, config.train.seed) for name, p in parameters(decoder)}
    save_file(to_theirs(spec, llama.keys(spec), weights), folder / "model.safetensors", metadata={"format": "pt"})
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
