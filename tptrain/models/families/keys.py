"""Names of tensors, ours and Hugging Face's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tptrain.models.spec import DecoderSpec

LAYER = {  # within a layer, as Llama's model names them: ours -> theirs
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.q_proj.weight": "self_attn.q_proj.weight",
    "self_attn.k_proj.weight": "self_attn.k_proj.weight",
    "self_attn.v_proj.weight": "self_attn.v_proj.weight",
    "self_attn.o_proj.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}


def same(*names: str) -> dict[str, str]:
    """Tensors that have one name on both sides."""
    return {name: name for name in names}


ATTENTION_BIASES = same(*(f"self_attn.{name}_proj.bias" for name in "qkvo"))
FFN_BIASES = same(*(f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")))
QK_NORMS = same("self_attn.q_norm.weight", "self_attn.k_norm.weight")
OUTER = {  # of the model, but for its layers
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Key:
    """Where a parameter of ours lies in a Hugging Face model: in one tensor, all of it or blocks of its rows.

    Rows are output features: of a tensor that is `transposed`, (in, out) where ours is (out, in), the columns.
    """

    ours: str
    theirs: str
    first: int = 0  # row of theirs at which ours begins
    block: int | None = None  # rows of ours that lie together; None: all of them
    period: int = 0  # rows of theirs from the beginning of one block to that of the next
    transposed: bool = False

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rows `start` to `stop` of ours, in runs: where a run begins in ours, where in theirs, and its length."""
        while start < stop:
            index, place = divmod(start, self.block or stop)
            length = min(stop - start, (self.block or stop) - place)
            yield start, self.first + index * self.period + place, length
            start += length


def named(
    spec: DecoderSpec, layer: Mapping[str, str], outer: Mapping[str, str] = OUTER, layers: str = "model.layers"
) -> Iterator[Key]:
    """One tensor for each parameter, by names alone. `layer`: ours -> theirs within a layer, `outer`: of the others."""
    for ours, theirs in outer.items():
        if ours != "lm_head.weight" or not spec.tied:
            yield Key(ours, theirs)
    for i in range(len(spec.layers)):
        for ours, theirs in layer.items():
            yield Key(f"layers.{i}.{ours}", f"{layers}.{i}.{theirs}")
