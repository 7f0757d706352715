"""What Transformers says of a model, as a process: a question in JSON on standard input, the answer on standard output.

So `launch` neither imports torch nor waits for it where the model is one of tptrain's own.
"""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch

from tptrain.config import UserError
from tptrain.hf import check_installed
from tptrain.models.safetensors import TensorFiles
from tptrain.nn.parameter import parameters
from tptrain.parallel.mesh import Mesh, tp_grid


def resolve(directory: str | None, source: dict[str, Any], plan: dict[str, str], dropout: float | None, tp: int) -> Any:
    """The facts of the model of a config.json. Raises UserError where it cannot be trained at this tp, or where the
    directory has not its tensors.
    """
    from tptrain.hf.model import TransformersModel, kv_heads, read_config
    from tptrain.hf.weights import check_shapes, sources

    config = read_config(source, dropout)
    mesh = Mesh(tp_grid(tp, tp, kv_heads(config)), 0, torch.device("meta"))
    model = TransformersModel(config, mesh, plan)
    if directory is not None:
        shapes = {name: entry.shape for name, entry in TensorFiles(Path(directory), integers=True).entries.items()}
        check_shapes(model.whole, sources(model.whole, shapes), shapes, model.shapes)
    return _facts(model)


def resolve_cut(
    source: dict[str, Any],
    plan: dict[str, str],
    dropout: float | None,
    vocab: int | None = None,
    width: int | None = None,
    tp: int = 1,
) -> Any:
    """The facts of what `verify` runs of a model, which of its layers that has, and which of its sizes are smaller.

    Raises UserError for a model that cannot be made so narrow and still be cut at this tp as the whole one is.
    """
    from tptrain.hf.cut import stack
    from tptrain.hf.model import TransformersModel, build, kv_heads, read_config
    from tptrain.hf.width import blamed_on_width, check_cuts_alike, narrow, widths

    config = read_config(source, dropout, vocab)
    layers = stack(build(config))
    mesh = Mesh(tp_grid(tp, tp, kv_heads(config)), 0, torch.device("meta"))
    chosen = layers.chosen if layers.name else None
    model, smaller = TransformersModel(config, mesh, plan, layers=chosen), ()
    if width is not None:
        whole, smaller = model, widths(config, width, tp)
        with blamed_on_width(width, config.model_type, (Exception,)):
            narrow(config, smaller)
            model = TransformersModel(config, mesh, plan, layers=chosen)
        check_cuts_alike(whole, model, width)
    known = {"stack": layers.name, "total": layers.total, "kinds": len(layers.kinds), "layers": layers.chosen}
    return {**known, "widths": smaller, "facts": _facts(model)}


def _facts(model: Any) -> dict[str, Any]:
    from tptrain.hf.model import kv_heads, max_positions

    config = model.inner.config
    text = config.get_text_config()
    layouts = {name: p.sharding for name, p in parameters(model)}
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": text.hidden_size,
        "max_positions": max_positions(config),
        "heads": _first(text, "num_attention_heads") or 1,
        "kv_heads": kv_heads(config),
        "parameters": sum(math.prod(each.shape) for each in layouts.values()),
        "matrix_parameters": sum(math.prod(each.shape) for each in layouts.values() if len(each.shape) > 1),
        "multiplied": _multiplied(model.inner, layouts),
        "attention": _attention(text),
        "proposed": dict(model.proposed),
    }


def _multiplied(inner: Any, layouts: Any) -> int:
    """Weights that multiply each token: of the experts those that a token is sent to; of a table none."""
    text = inner.config.get_text_config()
    experts, chosen = (_first(text, *names) for names in (EXPERTS, CHOSEN))
    share = chosen / experts if experts and chosen else 1.0
    head = inner.get_output_embeddings().weight
    total = math.prod(head.sharding.shape)
    tables = {id(m.weight) for m in inner.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    for name, p in inner.named_parameters():
        if id(p) not in tables and len(p.sharding.shape) > 1:
            total += math.prod(p.sharding.shape) * (share if ".experts." in name else 1)
    return round(total)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")


def _first(config: Any, *names: str) -> int | None:
    """The first of these fields that is a number, the same for all layers."""
    return next((value for name in names if isinstance(value := vars(config).get(name), int)), None)


def _attention(text: Any) -> list[tuple[int, int | None]]:
    """Width and window of each layer with attention."""
    heads = _first(text, "num_attention_heads") or 1
    width = heads * (_first(text, "head_dim") or text.hidden_size // heads)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = _first(text, "sliding_window")
    return [(width, window if "sliding" in kind else None) for kind in kinds if "attention" in kind]


def main() -> int:
    logging.disable(logging.WARNING)
    try:
        check_installed()
        verb, *question = json.load(sys.stdin)
        print(json.dumps((resolve_cut if verb == "cut" else resolve)(*question)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
