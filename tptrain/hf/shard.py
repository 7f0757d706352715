"""Cuts a Transformers model on the tp axis, module by module, in the styles of its plan.

Each parameter becomes a `Parameter`, a plain slice of a global tensor; modules that communicate get another `forward`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation

from tptrain.config import UserError
from tptrain.hf.plan import COLUMN, EMBEDDING, ROW, Plan, style_of
from tptrain.hf.region import Region, linear
from tptrain.nn.embedding import lookup
from tptrain.nn.parameter import Parameter, Sharding, parameter, sharding
from tptrain.parallel.mesh import Mesh

PACKED = 2  # matrices in a packed one: gate and up
KEYS_AND_VALUES = ("k_proj", "v_proj")


class CutEmbedding(nn.Embedding):
    """A table that is cut by rows. Stands between a class of Transformers and torch's `Embedding`, so that what that
    class does beside the lookup (a scale, a norm) is done to the sum over the ranks.
    """

    mesh: Mesh

    def forward(self, input: Tensor) -> Tensor:
        """(...) token ids -> (..., D)."""
        table: Any = self.weight
        return lookup(input.flatten(), table, self.mesh, self.padding_idx).view(*input.shape, -1)


class Sharder:
    """Cuts one model. `vocabulary`: modules whose rows are the vocabulary, and their number with padding; `prefix`: the
    name of the decoder in the model.
    """

    def __init__(self, model: Any, plan: Plan, mesh: Mesh, vocabulary: dict[str, int], prefix: str) -> None:
        self.model, self.plan, self.mesh, self.vocabulary, self.prefix = model, plan, mesh, vocabulary, prefix
        self.region, self.tp = Region(mesh), mesh.size("tp")
        self.modules = dict(model.named_modules())
        self.parameters: dict[
            int, Parameter
        ] = {}  # by the id of the tensor that it takes the place of: tied ones are one
        self.replaced: list[nn.Parameter] = []  # kept, or ids come again

    def shard(self) -> Region:
        """Cut everything. Raises UserError where a style does not suit a module, naming both."""
        for name, module in self.modules.items():
            for key, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[key] = self._parameter(name, module, key, p)
            for key, buffer in list(module._buffers.items()):
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    self._keep_buffer(name, module, key, buffer)
        for name, module in self.modules.items():
            self._connect(name, module, style_of(self.plan, name))
        return self.region

    # -------------------------------------------------------------------------------------------------- parameters

    def _parameter(self, name: str, module: Any, key: str, p: nn.Parameter) -> Parameter:
        if id(p) not in self.parameters:
            full = f"{name}.{key}" if name else key
            style = style_of(self.plan, full) or style_of(self.plan, name) or "replicate"
            layout, shape = self._layout(name, full, module, style, tuple(p.shape))
            own = parameter(self.mesh, layout)
            own.shape_in_module = shape
            own.requires_grad_(p.requires_grad and self._is_text(full))
            own.keeps_float32 = self._keeps_float32(full)
            self.parameters[id(p)] = own
            self.replaced.append(p)
        return self.parameters[id(p)]

    def _is_text(self, name: str) -> bool:
        """Whether a parameter is the decoder's or the head's; those of images or sounds are not trained."""
        return name.startswith(f"{self.prefix}.") or not self.prefix or name.rpartition(".")[0] in self.vocabulary

    def _keeps_float32(self, name: str) -> bool:
        """What Transformers keeps in float32 where the model is in bfloat16: routers, as a rule."""
        names: list[Any] = list(self.model._keep_in_fp32_modules_strict or ())
        return bool(names) and build_glob_alternation(names)[0].search(name) is not None

    def _layout(
        self, name: str, full: str, module: Any, style: str, shape: tuple[int, ...]
    ) -> tuple[Sharding, tuple[int, ...]]:
        """How a parameter of this shape lies over the mesh, and the shape that its module sees."""
        if name in self.vocabulary:
            layout = sharding(self.mesh, (self.vocabulary[name], *shape[1:]), {0: "tp"})
            return layout, layout.local_shape
        dim, axis = self._cut(name, module, style, len(shape))
        if dim is None or axis is None:
            return sharding(self.mesh, shape), shape
        parts = PACKED if style.startswith("packed") else 1
        self._check_size(full, style, shape[dim] // parts, self.mesh.size(axis))
        summed = ("kv",) if axis == "kv_shard" else ()
        if parts == 1:
            layout = sharding(self.mesh, shape, {dim: axis}, summed)
            return layout, layout.local_shape
        unpacked = (*shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :])
        layout = sharding(self.mesh, unpacked, {dim + 1: axis}, summed)
        local = layout.local_shape
        return layout, (*local[:dim], parts * local[dim + 1], *local[dim + 2 :])

    def _cut(self, name: str, module: Any, style: str, dims: int) -> tuple[int | None, str | None]:
        """The dim that is cut, and the axis: None of both where the parameter stays whole."""
        if style in COLUMN:
            return max(0, dims - 2), self._column_axis(name, module, style)
        if style in ROW:
            return (dims - 1, "tp") if dims > 1 else (None, None)
        if style in EMBEDDING:
            return (0 if style == "embedding_rowwise" else 1), "tp"
        return None, None

    def _column_axis(self, name: str, module: Any, style: str) -> str | None:
        """The axis that output features are cut on. Where there are fewer KV heads than ranks, neighbours have the same
        ones; a single KV head is everywhere, and so whole.
        """
        heads = self._kv_heads(name, module)
        if style != "colwise" or heads is None or heads % self.tp == 0:
            return "tp"
        if heads == 1:
            return None
        if heads == self.mesh.size("kv_shard"):
            return "kv_shard"
        raise UserError(
            f"parallel.tp={self.tp}: {name} has {heads} heads, which neither divide it nor are divided by it. "
            "Choose a tp for which one divides the other."
        )

    def _kv_heads(self, name: str, module: Any) -> int | None:
        """Heads of a projection to keys or values; None of any other module."""
        parent, _, leaf = name.rpartition(".")
        head_dim = getattr(self.modules[parent], "head_dim", None) if leaf in KEYS_AND_VALUES else None
        keys = self.modules.get(f"{parent}.k_proj", module)  # the heads of values may be of another size
        features = getattr(keys, "out_features", None)
        return features // head_dim if isinstance(head_dim, int) and isinstance(features, int) else None

    def _check_size(self, name: str, style: str, size: int, parts: int) -> None:
        if size % parts:
            raise UserError(f"parallel.tp={self.tp}: does not divide the {size} features of {name} ({style}).")

    def _keep_buffer(self, name: str, module: Any, key: str, buffer: Tensor) -> None:
        """A buffer that belongs to the weights is stored like a frozen parameter; a table of whole numbers is not."""
        if not buffer.dtype.is_floating_point:
            return
        del module._buffers[key]
        frozen = parameter(self.mesh, sharding(self.mesh, tuple(buffer.shape)))
        frozen.requires_grad_(False)
        frozen.keeps_float32 = self._keeps_float32(f"{name}.{key}" if name else key)
        module.register_parameter(key, frozen)

    # ----------------------------------------------------------------------------------------------------- modules

    def _connect(self, name: str, module: Any, style: str | None) -> None:
        """Give a module the `forward` of its style."""
        if name in self.vocabulary and isinstance(module, nn.Embedding):
            self._cut_embedding(module)
        elif self.tp == 1 or style is None:
            if type(module).forward is nn.Linear.forward:  # for its weight gradient, which goes into float32
                module.forward = _whole_linear(module)
        elif style in ("colwise", "packed_colwise"):
            module.forward = self._column(name, module, style)
        elif style in COLUMN:
            column, gather = self._column(name, module, style), self.region.gather
            module.forward = lambda x, *rest: gather(column(x, *rest))
        elif style in ROW:
            module.forward = self._row(name, module, style)
        elif style == "embedding_colwise":
            forward, gather = module.forward, self.region.gather
            module.forward = lambda ids: gather(forward(ids))
        elif style == "embedding_rowwise":
            self._cut_embedding(module)
        elif style in CONNECT:
            module.forward = CONNECT[style](self.region, module, self.model)
        if style_of(self.plan, f"{name}.q_proj") == "colwise":
            self._count_groups(module)

    def _column(self, name: str, module: Any, style: str) -> Callable[..., Tensor]:
        if not hasattr(module, "out_features"):
            raise UserError(f"model.tp_plan: {name} is to be {style}, and {type(module).__name__} is no linear.")
        region = self.region
        if type(module).forward is nn.Linear.forward:
            return lambda x: region.column(x, module.weight, module.bias)
        forward = module.forward
        return lambda x, *rest, **named: forward(region.enter(x)[0], *rest, **named)

    def _row(self, name: str, module: Any, style: str) -> Callable[..., Tensor]:
        if not hasattr(module, "in_features"):
            raise UserError(f"model.tp_plan: {name} is to be {style}, and {type(module).__name__} is no linear.")
        region = self.region
        split = region.split if style in ("rowwise_split_input", "rowwise_rep") else None
        split_output = region.split if style == "rowwise_split_output" else None
        if type(module).forward is not nn.Linear.forward:
            raise UserError(
                f"model.tp_plan: {name} is to be {style}, and {type(module).__name__} is more than a linear."
            )

        def forward(x: Tensor) -> Tensor:
            """(..., F/tp), or (..., F) where it is split here -> (..., D), or (..., D/tp) where that is."""
            y = region.row(x if split is None else split(x), module.weight, module.bias)
            return y if split_output is None else split_output(y)

        return forward

    def _cut_embedding(self, module: Any) -> None:
        """Let a table that is cut by rows be looked up as such, whatever its class does with the result."""
        kind = type(module)
        module.__class__ = type(
            kind.__name__, (kind, CutEmbedding) if kind is not nn.Embedding else (CutEmbedding,), {}
        )
        module.mesh = self.mesh

    def _count_groups(self, attention: Any) -> None:
        """Queries that share a key, on this rank."""
        groups = getattr(attention, "num_key_value_groups", None)
        heads = getattr(getattr(attention, "config", None), "num_attention_heads", None)
        if groups is not None and heads is not None:
            kv_heads = heads // groups
            own = kv_heads // self.tp if kv_heads % self.tp == 0 else max(1, kv_heads // self.mesh.size("kv_shard"))
            attention.num_key_value_groups = heads // self.tp // own


def _whole_linear(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, None, module.weight, module.bias)


def _latent_keys(region: Region, module: Any, model: Any) -> Callable[[Tensor], Tensor]:
    """Multi-head latent attention's projection to (compressed keys and values | rotary key): the key goes to every
    head as it is, so its gradient is a sum over the ranks.
    """
    forward, d = module.forward, model.config.get_text_config().qk_rope_head_dim

    def both(x: Tensor) -> Tensor:
        """(..., D) -> (..., C + d)."""
        return region.enter_last(forward(x), d)

    return both


def _experts(region: Region, module: Any, model: Any) -> Callable[..., Tensor]:
    """Each rank has a part of every expert's features. Tokens and their weights are alike everywhere."""
    forward = module.forward

    def enter(x: Any) -> Any:
        return region.enter(x)[0] if isinstance(x, Tensor) and x.dtype.is_floating_point else x

    def experts(*inputs: Any, **named: Any) -> Tensor:
        """(N, D), indices and weights of the chosen experts -> (N, D)."""
        y = forward(*map(enter, inputs), **{key: enter(value) for key, value in named.items()})
        return region.leave(y)

    return experts


def _summed(region: Region, module: Any, model: Any) -> Callable[..., Tensor]:
    """A module whose output is a summand; where its own parameters are cut, its inputs are entered as experts' are."""
    if any(p.sharding.cuts for p in module._parameters.values() if p is not None):  # type: ignore[union-attr]
        return _experts(region, module, model)
    forward = module.forward
    return lambda *inputs, **named: region.leave(forward(*inputs, **named))


def _identity_expert(region: Region, module: Any, model: Any) -> Callable[..., Tensor]:
    """An expert that returns its input: of the sum over the ranks each has its share."""
    forward, tp = module.forward, 1 if region.group is None else region.group.size
    return lambda x, *rest: forward(x / tp, *rest)


CONNECT: dict[str, Callable[[Region, nn.Module, Any], Callable[..., Tensor]]] = {
    "mla_kv_a_proj": _latent_keys,
    "all_reduce": _summed,
    "moe_tp_experts": _experts,
    "moe_identity_expert": _identity_expert,
}
