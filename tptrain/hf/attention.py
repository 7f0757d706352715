"""Our attention in Transformers' models, through its registers of attention functions and of masks.

It takes the place of SDPA in the models of `use_ours`, where a mask is one that it knows: causal, or causal with a
sliding window. Every other mask, and whatever else SDPA is given (a bias, sinks), goes to Transformers' own function.

Shapes: B batch, T sequence, H/tp heads of queries and K/tp of keys on this rank, d head_dim.
"""

import inspect
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tptrain.ops.table import Operations

NAME = "sdpa"  # whose place ours takes: code of models asks for it by this name
WINDOWED = {"causal_mask_function", "sliding_window_overlay"}  # Transformers' functions that such a mask is made of
# Of a model's calls, beside masks: of caches, and the window, which is in the mask.
IRRELEVANT = ("sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "logits_to_keep")
IRRELEVANT += ("output_router_logits",)


class WindowMask(Tensor):
    """A mask of Transformers, of which it is known that it is causal with this window, and nothing else.

    None: a model has made another one out of it.
    """

    window: int | None = None


def mask(*arguments: Any, allow_is_causal_skip: bool = True, **named: Any) -> Tensor | None:
    """Transformers' mask (B, 1, T, T), with its window where it is a plain one. None: causal."""
    plain = sdpa_mask(*arguments, allow_is_causal_skip=allow_is_causal_skip, **named)
    if plain is None or not allow_is_causal_skip or not _is_window(named.get("mask_function")):
        return plain
    known = plain.as_subclass(WindowMask)
    known.window = named["local_size"] if named.get("attention_mask") is None else None
    return known


def _is_window(function: Any) -> bool:
    """Whether a mask is causal with a sliding window: not one of chunks, which have a local size as well."""
    parts = inspect.getclosurevars(function).nonlocals.get("mask_functions", ()) if inspect.isfunction(function) else ()
    names = {part.__qualname__.split(".")[0] for part in parts}
    return function.__qualname__.startswith("and_masks.") and names == WINDOWED if names else False


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (B, H/tp, T, d), key and value (B, K/tp, T, d) -> (B, T, H/tp, d)."""
    ops = cast(Operations | None, getattr(module, "operations", None))
    window = attention_mask.window if isinstance(attention_mask, WindowMask) else None
    known = attention_mask is None or window is not None
    others = {name: item for name, item in others.items() if item is not None and name not in IRRELEVANT}
    plain = getattr(module, "is_causal", True) and not dropout and not others
    if ops is None or not known or not plain or query.shape[2:] != key.shape[2:] or key.shape != value.shape:
        named = {"dropout": dropout, "scaling": scaling, "softcap": softcap, **others}
        whole = None if attention_mask is None else attention_mask.as_subclass(Tensor)
        return sdpa_attention_forward(module, query, key, value, whole, **named)  # type: ignore[arg-type]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, heads, d)
    window = window if window is not None and window < q.shape[1] else None
    scale = None if scaling is None or abs(scaling * q.shape[-1] ** 0.5 - 1) < 1e-6 else scaling
    if (window, scale, softcap) == (None, None, None):
        y = ops.attention(q, k, v)
    else:
        y = ops.masked_attention(q, k, v, window, scale, softcap)
    return y.contiguous(), None  # as SDPA's is: some models take a view of it


def use_ours(inner: Any, ops: Operations) -> None:
    """Let a model's text layers attend by `ops`, where Transformers would take SDPA."""
    config = inner.config.get_text_config()
    if config._attn_implementation != NAME:
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    for module in inner.modules():
        if getattr(module, "config", None) is config:
            module.operations = ops
