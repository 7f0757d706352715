"""Hugging Face directories made on the spot, as `save_pretrained` leaves them: random weights, a tokenizer."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.corpus import write_corpus
from tests.families import SMALL
from tests.reference import Case, hf_model
from tptrain.checkpoint.commit import Commit
from tptrain.checkpoint.pretrained import weights_to_write
from tptrain.checkpoint.save import write_checkpoint
from tptrain.config import Config
from tptrain.ops.table import REFERENCE
from tptrain.parallel.mesh import Mesh
from tptrain.train.trainer import new_model

SPECIAL = ["<s>", "</s>", "<unk>"]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def save_model(case: Case, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> torch.nn.Module:
    """The model that Transformers makes of a case, every parameter drawn at random; returns it."""
    torch.manual_seed(0)
    model = hf_model(case)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.1)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    return model


def write_imported(config: Config, mesh: Mesh, step: int, dtype: torch.dtype) -> None:
    """The checkpoint that `import` writes. Every rank calls it; no more than one slice is in memory at a time."""
    slices = list[torch.Tensor]()
    with weights_to_write(config.model, new_model(config, mesh, REFERENCE), dtype) as state:

        def counted(read: Any) -> torch.Tensor:
            slices.append(read())
            assert all(tensor.untyped_storage().size() == 0 for tensor in slices[:-1])
            return slices[-1]

        parts = {name: replace(part, read=partial(counted, part.read)) for name, part in state.items()}  # type: ignore[arg-type,union-attr]
        commit = Commit(step, 0, mesh.world, mesh.size("tp"), "", 0, {}, optimizer=False)
        write_checkpoint(Path(config.run.dir) / "checkpoints", parts, commit, config, mesh)
    assert 1 < len(slices) <= len(state)  # what several ranks have alike one of them writes


def save_tokenizer(folder: Path, vocabulary: int = SMALL["vocab_size"]) -> None:
    """A byte-level BPE that puts <s> before a text, in a tokenizer.json and all that goes with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.BPEDecoder()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)  # type: ignore[call-arg]
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(folder)
    tokenizer.train([str(corpus)], trainer)
    corpus.unlink()
    single, special = "<s> $A", [("<s>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
