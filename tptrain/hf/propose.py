"""A plan for layers that a model's own plan leaves whole, proposed from the names and shapes of their modules.

There are two ways to cut a pair of linears (q, k and v with o; gate and up with down):

    features   colwise, then rowwise: each rank has its own heads or features in between, and computes those only
    weights    colwise_gather_output, then rowwise_split_input: every rank has all features in between, and computes the
               same as one process does. Right whatever the module does there; it costs a gather.

Features are cut only where everything in the module is known: it has linears of these names and sizes, norms over the
features of a head, and nothing else. Otherwise the weights are, as in the plans that Transformers has for such modules
(olmo2's norms over all heads, phi3's fused projections). Mixers with a convolution stay whole, and so does every module
of which the plan names a part.

A proposal is to be checked against one process before training: a `forward` may do with heads or features what names
and shapes do not show.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from tptrain.hf.plan import COLUMN, EMBEDDING, OTHERS, ROW, Plan, pattern, style_of
from tptrain.parallel.mesh import Grid

SPLIT = ("q_proj", "k_proj", "v_proj")
ATTENTION_INPUT = (SPLIT, ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("c_attn",))
ATTENTION_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
# Linears of an FFN; the last one is back to the hidden size. The first of the second kind may be gate and up in one.
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
PLAIN = (
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("input_linear", "output_linear"),
)
PER_HEAD = ("sinks",)  # parameters of H elements
GATE_OF_HEADS = ("g_proj",)  # linears of H output features
# Whole numbers that an attention module may have. With another one, such as `num_heads`, it may count on all heads.
NUMBERS = {"layer_idx", "head_dim", "num_key_value_groups", "sliding_window"}
# What Transformers says of an experts module that can be cut in the styles there are. The bias of the output would be
# added by every rank.
EXPERTS = {"has_gate": True, "has_bias": False, "has_post_expert_norm": False}
CONVOLUTION = (nn.Conv1d, nn.Conv2d)
ACTIVATION = re.compile("gelu|silu|relu|swish|tanh|sigmoid|mish|activation|identity", re.IGNORECASE)  # of classes
REDUCTIONS = {"amax", "amin", "cumsum", "max", "mean", "min", "norm", "softmax", "sort", "std", "sum", "topk", "var"}
CUTTING = (*COLUMN, *ROW, *EMBEDDING, *OTHERS, "replicate")  # what a plan says it cuts, or wants whole
IN_A_LAYER = re.compile(r"\.\d+(\.|$)")
ONE_OF_EXPERTS = re.compile(r"(^|\.)experts\.\d+(\.|$)")  # which tokens it gets differs, and so would its collectives


def cuts_layers(plan: Plan, names: Iterable[str]) -> bool:
    """Whether a plan cuts anything in the numbered layers of a model with these modules and parameters."""
    return any(IN_A_LAYER.search(name) and style_of(plan, name) in CUTTING[:-1] for name in names)


def proposal(model: nn.Module, plan: Plan, grid: Grid, prefix: str) -> Plan:
    """Styles for modules and parameters of the decoder with this prefix that `plan` leaves whole, by pattern; by name
    where layers of a pattern differ. Proposes only cuts that the number of ranks allows.
    """
    modules, inside = dict(model.named_modules()), f"{prefix}." if prefix else ""
    names = [*modules, *(name for name, _ in model.named_parameters())]
    planned = [name for name in names if style_of(plan, name) in CUTTING]
    styles: dict[str, str] = {}
    for name, module in modules.items():
        layer = f"{name}.".startswith(inside) and IN_A_LAYER.search(name)
        if not layer or ONE_OF_EXPERTS.search(name) or _is_planned(name, planned):
            continue
        entries = _experts(module, grid) or {**_attention(module, grid), **_ffn(module, grid)}
        styles |= {f"{name}.{leaf}".removesuffix("."): style for leaf, style in entries.items()}
    return _by_pattern(styles, names)


def _is_planned(name: str, planned: Iterable[str]) -> bool:
    """Whether a plan names a module, a part of it, or what it is a part of."""
    return any(f"{each}.".startswith(f"{name}.") or name.startswith(f"{each}.") for each in planned)


def _by_pattern(styles: Plan, names: Iterable[str]) -> Plan:
    """The same, by pattern where all names of it have one style."""
    alike: dict[str, set[str | None]] = {}
    for name in names:
        alike.setdefault(pattern(name), set()).add(styles.get(name))
    return {pattern(name) if len(alike[pattern(name)]) == 1 else name: style for name, style in styles.items()}


# ------------------------------------------------------------------------------------------------------------ attention


def _attention(module: nn.Module, grid: Grid) -> Plan:
    """Styles of an attention's parts, by their names in the module; empty where it is none, or stays whole."""
    linears = _linears(module)
    into = next((each for each in ATTENTION_INPUT if all(name in linears for name in each)), None)
    out = next((name for name in ATTENTION_OUTPUT if name in linears), None)
    if into is None or out is None or any(isinstance(each, CONVOLUTION) for each in module.modules()):
        return {}
    tp = grid.size("tp")
    if into == SPLIT and _is_known_attention(module, linears, out):
        heads, kv_heads = (linears[name].out_features // _head_dim(module) for name in ("q_proj", "k_proj"))
        if heads % tp == 0 and (kv_heads % tp == 0 or kv_heads in (1, grid.size("kv_shard"))):
            columns = [*into, *(name for name in GATE_OF_HEADS if name in linears)]
            columns += [name for name in PER_HEAD if name in module._parameters]
            return {**dict.fromkeys(columns, "colwise"), out: "rowwise"}
    return _weights(linears, into, out, tp)


def _is_known_attention(module: Any, linears: Mapping[str, nn.Linear], out: str) -> bool:
    """Whether each rank can have its own heads of an attention with q, k and v, and there is nothing else in it."""
    d, (q, k, v) = _head_dim(module), (linears[name].out_features for name in SPLIT)
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if not d or q != linears[out].in_features or k != v or q % d or k % d or q // d != heads:
        return False
    if q % k or getattr(module, "num_key_value_groups", 1) != q // k:
        return False
    numbers = {name for name, value in vars(module).items() if type(value) is int}
    parameters = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    known = all(name in PER_HEAD and shape == (heads,) for name, shape in parameters.items())
    known = known and not any(b is not None for b in module._buffers.values())
    for name, child in module.named_children():
        shapes = {tuple(p.shape) for p in child.parameters()}
        gate = name in GATE_OF_HEADS and name in linears and heads == linears[name].out_features != d
        norm = "norm" in name and shapes == {(d,)} and not any(child.children())
        neutral = not shapes and (isinstance(child, nn.Dropout) or "rotary" in name)
        known = known and (name in (*SPLIT, out) or gate or norm or neutral)
    return known and numbers <= NUMBERS


def _head_dim(module: nn.Module) -> int:
    """0 where the module does not say."""
    d = getattr(module, "head_dim", 0)
    return d if isinstance(d, int) else 0


# ------------------------------------------------------------------------------------------------------------------ FFN


def _ffn(module: nn.Module, grid: Grid) -> Plan:
    """Styles of an FFN's linears, by their names in the module; empty where it has none, or they stay whole."""
    linears, tp = _linears(module), grid.size("tp")
    names = next((each for each in (*GATED, *PLAIN) if all(name in linears for name in each)), None)
    if names is None or any(isinstance(each, CONVOLUTION) for each in module.children()):
        return {}
    *into, out = names
    features, hidden = linears[out].in_features, linears[out].out_features
    widths = {linears[name].out_features for name in into}
    if any(linears[name].in_features != hidden for name in into):
        return {}
    if widths == {2 * features} and names in PLAIN:
        return _weights(linears, into, out, tp)
    if widths != {features}:
        return {}
    if _reduces(module) or any(_is_over(each, features) for each in _others(module, names)):
        return _weights(linears, into, out, tp)
    return {**dict.fromkeys(into, "colwise"), out: "rowwise"} if features % tp == 0 else {}


def _others(module: nn.Module, names: Iterable[str]) -> Iterator[nn.Module | nn.Parameter]:
    """What a module has beside the linears of these names."""
    yield from (each for name, each in module.named_children() if name not in names)
    yield from (p for p in module._parameters.values() if p is not None)


def _is_over(each: nn.Module | nn.Parameter, features: int) -> bool:
    """Whether this may be something over an FFN's features that is not the same for each: only activations, dropout and
    what has weights of other sizes are not.
    """
    if isinstance(each, nn.Parameter):
        return features in each.shape
    shapes = [p.shape for p in each.parameters()]
    if shapes:
        return any(features in shape for shape in shapes)
    return not (isinstance(each, nn.Dropout) or ACTIVATION.search(type(each).__name__))


def _reduces(module: nn.Module) -> bool:
    """Whether code of the module's class names an operation that may be over all features."""
    kinds = (kind for kind in type(module).__mro__ if not kind.__module__.startswith(("torch.", "builtins")))
    functions = (inspect.unwrap(f) for kind in kinds for f in vars(kind).values() if inspect.isfunction(f))
    return any(not REDUCTIONS.isdisjoint(f.__code__.co_names) for f in functions if f.__name__ != "__init__")


# -------------------------------------------------------------------------------------------------------------- experts


def _experts(module: Any, grid: Grid) -> Plan:
    """Styles of experts in two tensors, gate and up (E, 2F, D) and down (E, D, F), or (E, D, 2F) and (E, F, D); "" is
    the module. Empty where it is something else.
    """
    up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    others = len(list(module.parameters())) != 2
    if up is None or down is None or others or any(getattr(module, k, None) != v for k, v in EXPERTS.items()):
        return {}
    if up.dim() != 3 or down.dim() != 3:
        return {}
    transposed = module.is_transposed
    hidden, features = reversed(down.shape[1:]) if transposed else down.shape[1:]
    wide = (hidden, 2 * features) if transposed else (2 * features, hidden)
    if tuple(up.shape[1:]) != wide or len(up) != len(down) or features % grid.size("tp"):
        return {}
    columns, rows = ("rowwise", "colwise") if transposed else ("colwise", "rowwise")  # of a tensor's dims
    packed = "packed_" if module.is_concatenated else ""  # else gate and up alternate
    return {"gate_up_proj": packed + columns, "down_proj": rows, "": "moe_tp_experts"}


# -------------------------------------------------------------------------------------------------------------- linears


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The children that are linears and nothing more, by name."""
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward
    }


def _weights(linears: Mapping[str, nn.Linear], into: Iterable[str], out: str, tp: int) -> Plan:
    """Weights cut, features not. Empty where the ranks do not divide them."""
    if linears[out].in_features % tp or any(linears[name].out_features % tp for name in into):
        return {}
    return {**dict.fromkeys(into, "colwise_gather_output"), out: "rowwise_split_input"}
