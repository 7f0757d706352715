"""A small text, the same on every machine, and a model small enough to train on it in seconds."""

import random
from pathlib import Path

SMALL = [
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=96",
    "model.initializer_range=0.02",
    "train.seq_len=32",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.steps=20",
    "train.eval_every=0",
    "train.eval_sequences=8",
    "train.device=cpu",
    "optim.lr=1e-3",
    "optim.warmup_steps=5",
    "logging.every=1",
    "wandb.mode=disabled",
]


def write_corpus(folder: Path, documents: int = 100) -> Path:
    """A .jsonl file of sentences out of a fixed vocabulary of made-up words; about 60 kB."""
    draw = random.Random(0)
    letters = "aeioubcdfglmnprst"
    words = ["".join(draw.choice(letters) for _ in range(draw.randint(2, 7))) for _ in range(200)]
    path = folder / "corpus.jsonl"
    with path.open("w") as file:
        for _ in range(documents):
            text = " ".join(draw.choice(words) for _ in range(100))
            file.write(f'{{"text": "{text}."}}\n')
    return path


def overrides(folder: Path, name: str = "run") -> list[str]:
    """Overrides that train the small model on the corpus, everything written below `folder`."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(folder)
    return [
        *SMALL,
        "data=files",
        f"data.files=[{corpus}]",
        f"data.cache_dir={folder}/data",
        f"run.dir={folder}/{name}",
    ]
