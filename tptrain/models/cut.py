"""A model cut down to what `verify` runs: a few layers, one of every kind at least. Imports no torch."""

import math
from dataclasses import dataclass, replace
from typing import Any

from tptrain.config import Config
from tptrain.models.settings import decoder_spec
from tptrain.models.sizes import Facts, facts_of, sizes
from tptrain.models.spec import AttentionSpec, DecoderSpec, FFNSpec, LayerSpec, LongScaling, RotarySpec

LENGTH = 64  # tokens of a sequence, where the model has so many positions
SEQUENCES = 2  # of a micro-batch
BATCHES = 2  # micro-batches of a step, on each dp rank: gradients are added up
WINDOW = 24  # keys that a query of a layer with a sliding window sees at most: fewer than a sequence has


@dataclass(frozen=True)
class Cut:
    """A smaller decoder, and the model that it is of."""

    spec: DecoderSpec | Facts
    model: DecoderSpec | Facts
    layers: tuple[int, ...]  # which of the model's layers it has: of each kind one at least
    total: int  # layers of the model
    kinds: int  # of its layers
    stack: str = "layers"  # the name of the list of layers; empty: all of the model is run
    widths: tuple[tuple[str, int, int], ...] = ()  # of Transformers' config: field, its size in the model, and here

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return min(LENGTH, self.spec.max_positions)

    def source(self, name: str) -> str:
        """The name in the model of a parameter or module of the cut."""
        if not self.stack or not name.startswith(f"{self.stack}."):
            return name
        number, _, rest = name.removeprefix(f"{self.stack}.").partition(".")
        return ".".join([self.stack, str(self.layers[int(number)]), *([rest] if rest else [])])


def cut_of(config: Config) -> Cut:
    """What `verify` runs of a config's model. Raises UserError where that is no model."""
    if config.model.engine == "transformers":
        known = config.model.facts["cut"]
        facts, layers = facts_of(known["facts"]), tuple(known["layers"])
        widths = tuple((name, whole, smaller) for name, whole, smaller in known["widths"])
        return Cut(facts, sizes(config.model), layers, known["total"], known["kinds"], known["stack"], widths)
    return cut(decoder_spec(config.model), config.parallel.tp, config.verify.width, config.verify.vocab)


def cut(spec: DecoderSpec, tp: int, width: int | None = None, vocab: int | None = None) -> Cut:
    """The first layer of every kind, and the last one where there is one kind only.

    `width` in place of the hidden size shrinks heads and FFN with it, but not their numbers; `vocab` cuts the
    vocabulary. Sliding windows are cut so that the sequences reach beyond them.
    """
    first = {layer: i for i, layer in reversed(list(enumerate(spec.layers)))}
    chosen = set(first.values()) | ({len(spec.layers) - 1} if len(first) == 1 else set())
    layers = tuple(sorted(chosen))
    ratio = 1.0 if width is None else width / spec.hidden_size
    smaller = replace(
        spec,
        layers=tuple(_smaller(spec.layers[i], ratio, tp) for i in layers),
        hidden_size=width or spec.hidden_size,
        vocab_size=min(vocab or spec.vocab_size, spec.vocab_size),
    )
    return Cut(smaller, spec, layers, len(spec.layers), len(first))


def _smaller(layer: LayerSpec, ratio: float, tp: int) -> LayerSpec:
    mixers: list[Any] = [layer.token_mixer, layer.channel_mixer]
    for i, mixer in enumerate(mixers):
        if isinstance(mixer, AttentionSpec):
            mixers[i] = _smaller_attention(mixer, ratio)
        elif isinstance(mixer, FFNSpec) and ratio != 1.0:
            mixers[i] = replace(mixer, width=smaller_features(mixer.width, ratio, tp))
    return replace(layer, token_mixer=mixers[0], channel_mixer=mixers[1])


def smaller_features(size: int, ratio: float, tp: int) -> int:
    """Of an FFN, in proportion; the ranks of tp can cut it."""
    step = math.lcm(tp, 8)
    return max(1, round(size * ratio / step)) * step


def _smaller_attention(attention: AttentionSpec, ratio: float) -> AttentionSpec:
    window = None if attention.window is None else min(attention.window, WINDOW)
    attention = replace(attention, window=window)
    if ratio == 1.0:
        return attention
    head_dim, rotary = _even(attention.head_dim * ratio), attention.rotary
    if rotary is not None:
        dims = None if rotary.dims is None else min(head_dim, _even(rotary.dims * ratio))
        rotary = _with_dims(rotary, dims, head_dim)
    return replace(attention, head_dim=head_dim, rotary=rotary)


def _with_dims(rotary: RotarySpec, dims: int | None, head_dim: int) -> RotarySpec:
    scaling = rotary.scaling
    if isinstance(scaling, LongScaling):
        count = (dims or head_dim) // 2
        scaling = replace(scaling, short=scaling.short[:count], long=scaling.long[:count])
    return replace(rotary, dims=dims, scaling=scaling)


def _even(size: float) -> int:
    return max(4, 2 * round(size / 2))
