"""Names of tensors, ours and Hugging Face's."""

from collections.abc import Iterator
from dataclasses import dataclass

from tptrain.models.spec import DecoderSpec


@dataclass(frozen=True)
class Key:
    """One tensor of a Hugging Face model, and our parameters that it holds: equal parts of its output features."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # theirs is (in, out), ours (out, in)


def prefixed(spec: DecoderSpec, layer: list[str], prefix: str = "model.") -> Iterator[Key]:
    """Where the names are ours behind a prefix, but for the output head; `layer` has the names within a layer."""
    names = ["embed_tokens.weight", *(f"layers.{i}.{name}" for i in range(len(spec.layers)) for name in layer)]
    for name in [*names, "norm.weight"]:
        yield Key(f"{prefix}{name}", (name,))
    if not spec.tied:
        yield Key("lm_head.weight", ("lm_head.weight",))
