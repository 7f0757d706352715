"""Whole tensors between Hugging Face's names and layouts and ours."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.models.families.keys import Key
from tptrain.models.spec import DecoderSpec

VOCABULARY = ("embed_tokens.weight", "lm_head.weight")  # whose rows are padded


def to_ours(spec: DecoderSpec, keys: Iterable[Key], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors by our names: (out, in), rows of the vocabulary padded with zeros. Raises KeyError."""
    ours: dict[str, Tensor] = {}
    for key in keys:
        tensor = tensors[key.theirs].t() if key.transposed else tensors[key.theirs]
        ours |= dict(zip(key.ours, tensor.chunk(len(key.ours)), strict=True))
    rows = spec.padded_vocab_size - spec.vocab_size
    return {name: F.pad(t, (0, 0, 0, rows)) if name in VOCABULARY else t for name, t in ours.items()}


def to_theirs(spec: DecoderSpec, keys: Iterable[Key], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by Hugging Face's names, without padding. Raises KeyError."""
    theirs: dict[str, Tensor] = {}
    for key in keys:
        parts = [tensors[name][: spec.vocab_size] if name in VOCABULARY else tensors[name] for name in key.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        theirs[key.theirs] = (tensor.t() if key.transposed else tensor).contiguous()
    return theirs
