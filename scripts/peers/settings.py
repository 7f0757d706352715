"""A cell in tptrain's settings. Imports no torch."""

from pathlib import Path

from .cells import ADAM, SEED, Model


def overrides(
    model: Model, precision: str, cache_dir: Path, device: str = "cpu", directory: Path | None = None
) -> list[str]:
    """tptrain's settings for a cell; topology, steps and run directory are left to the caller. With `directory`, the
    model is the one that lies there, else it is trained from scratch.
    """
    settings = {
        "model.name": model.name,
        "model.vocab_size": model.vocab,
        "model.hidden_size": model.hidden,
        "model.num_hidden_layers": model.layers,
        "model.num_attention_heads": model.heads,
        "model.num_key_value_heads": model.kv_heads,
        "model.intermediate_size": model.ffn,
        "model.max_position_embeddings": model.seq_len,
        "model.initializer_range": 0.02,
    }
    if model.family == "qwen3":
        settings["model.qk_norm"] = "true"
    if directory is not None:
        settings = {"model": "hf", "model.path": directory}
    settings |= {
        "data": "stdlib",
        "data.tokenizer": "bytes",
        "data.cache_dir": cache_dir,
        "optim": "constant",
        "optim.warmup_steps": 0,
        "optim.lr": ADAM.lr,
        "optim.beta1": ADAM.beta1,
        "optim.beta2": ADAM.beta2,
        "optim.eps": ADAM.eps,
        "optim.weight_decay": ADAM.decay,
        "optim.grad_clip": ADAM.clip,
        "train.seq_len": model.seq_len,
        "train.global_batch_size": model.batch,
        "train.micro_batch_size": model.batch,
        "train.precision": precision,
        "train.seed": SEED,
        "train.device": device,
        "train.eval_every": 0,
        "train.eval_sequences": model.batch,
        "checkpoint.every": 0,
        "logging.every": 1,
        "wandb.mode": "disabled",
    }
    return [f"{key}={value}" for key, value in settings.items()]
